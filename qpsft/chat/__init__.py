"""`qpsft chat`: talk to an adapter, its base, or a merged model."""
