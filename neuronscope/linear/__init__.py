"""Find the layers of a network between which no nonlinearity lies: together they compute one linear map."""
