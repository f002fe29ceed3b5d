"The command `cjm-resources`, as `python -m cjm_fasthtml_resources`"
from .cli import main

if __name__ == "__main__": main()
