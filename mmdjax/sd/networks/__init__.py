"""The networks in Flax: U-Nets, transformers, autoencoders and text encoders, and the layers that they share."""
