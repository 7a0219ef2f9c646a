"""A model from the Hub: its listing, its files, and the marker that says which are there."""
