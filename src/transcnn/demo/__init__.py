"""The page that ``transcnn demo`` serves."""
