"""How many bytes and seconds does each stage take? In closed form, no torch."""
