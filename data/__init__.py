"""Real images, which only reference statistics need: no gradient of this project comes from them."""
