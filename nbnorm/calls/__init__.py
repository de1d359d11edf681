"""What a call gives and asks for: its arrays, whatever their library, and every check of them."""
