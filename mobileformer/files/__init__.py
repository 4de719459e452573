"""Files of any kind: what they say of themselves, read without trust, written whole. No torch here."""
