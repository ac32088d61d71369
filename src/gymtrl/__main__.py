"""`python -m gymtrl`"""

from gymtrl.cli.main import main

main()
