"""Running recipes: what is up to date, notebooks executed, jobs launched, the `rorem` command."""
