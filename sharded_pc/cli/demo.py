class Demo:
    help="x"
    def add_arguments(self,p): pass
    def run(self,a): pass
