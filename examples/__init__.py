"""Things to try the project with; not part of the installed package."""
