"""One module per runtime, the same names in each; ``base`` says what a session needs from any of them."""
