"""The page on which people remove objects from their own images, and the folder of a Hub Space."""
