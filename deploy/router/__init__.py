"""SGLang's router before several servers, behind an edge like theirs: ``python -m deploy.router``.

It needs the packages of requirements/router.txt, and none of SGLang's.
"""
