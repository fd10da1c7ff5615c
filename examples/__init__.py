"""Scripts of other packages' users and what changes in them; README.md has the table."""
