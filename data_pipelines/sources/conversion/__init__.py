"""Files without random access: written once to the cache folder in a format that has it."""
