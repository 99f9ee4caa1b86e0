"""Passes that make one op of several, or of an op and its constants."""
