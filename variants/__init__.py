"""The cast plan, the catalogue of named plans, the spec, and how each variant is run."""
