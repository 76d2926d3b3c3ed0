"""The report of a build: its data, and the tables, the page and the pictures that show it."""
