"""Files that cannot be read at random as they are: written once, in a form that can, to the cache folder."""
