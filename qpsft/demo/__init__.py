"""`qpsft demo`: the embedded base model (`model/`) and a walk from its demonstrations to a verified merged model."""
