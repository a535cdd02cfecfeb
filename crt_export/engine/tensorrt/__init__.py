"""TensorRT (10.16 or newer, 11.x) and TensorRT-RTX: ``build`` compiles a graph, ``engine`` runs what came out."""
