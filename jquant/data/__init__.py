"""Text sources, token blocks and their content hashes."""
