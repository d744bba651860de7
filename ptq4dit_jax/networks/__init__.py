"""Networks: tables of their parts (:mod:`~ptq4dit_jax.networks.spec`), and the verbs in which a forward is written."""
