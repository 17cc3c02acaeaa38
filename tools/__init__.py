"""Tools for whoever works on the repository: the table of rooms, the architecture picture and the pages of the site."""
