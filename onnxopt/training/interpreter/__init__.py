"""The graph as a torch module, and its weights back in the graph."""
