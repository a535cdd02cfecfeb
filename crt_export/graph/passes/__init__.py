"""One graph pass per file; each states what it requires and what it ensures, and checks both."""
