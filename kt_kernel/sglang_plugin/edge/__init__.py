"""What comes from a client, checked whole before SGLang computes with it.

``fields`` declares each field's kind and range, ``kinds`` what a kind is, ``check`` applies the
table to a request. ``http`` does so to each body before SGLang reads it, and answers 400;
``tokenizer`` to what SGLang made of it, so that a route that is forgotten is still safe;
``scheduler`` ends a request that fails there, in place of the server.
"""
