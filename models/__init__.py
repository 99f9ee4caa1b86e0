"""Builders of seeded models for tests and benchmarks, and an index of packages that ship real ones."""
