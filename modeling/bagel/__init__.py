"""The unified model: text, pictures to understand and pictures to draw in one packed sequence."""
