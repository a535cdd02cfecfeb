"""Language models: what each one declares, its equations, and its weights."""
