"""Networks: what one is made of (:mod:`~ptq4dit_jax.networks.spec`), and the verbs that its forward is written in."""
