#include "sharded_pc.h"
