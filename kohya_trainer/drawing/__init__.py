"""What is to be drawn, and sheets of what was. It knows no models."""
