"""Real images, which only reference statistics need: no gradient here comes from them."""
