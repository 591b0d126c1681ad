"""What a person draws and sees at a photograph: the mask's brush, before and after."""
