"""The claims of arXiv 2404.02690 (attention is n^C-sparse), measured on Gaussian inputs and on a real model."""
