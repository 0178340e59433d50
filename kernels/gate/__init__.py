"""The top-k gate: which experts serve a token, and with which weights."""
