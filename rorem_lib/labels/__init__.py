"""What people say of removals: the log, the queue, the widget, votes, other formats."""
