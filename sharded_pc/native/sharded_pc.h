/* Everything the Python binding sees. */
#ifndef SHARDED_PC_H
#define SHARDED_PC_H

#include "../attach/guest/handle.h"
#include "alias.h"
#include "bitmap.h"
#include "control.h"
#include "floor.h"
#include "guests.h"
#include "oracle.h"
#include "page_service.h"
#include "ram.h"
#include "records.h"
#include "return_path.h"
#include "ring.h"
#include "status.h"
#include "stream.h"
#include "uffd.h"
#include "view.h"
#include "worker.h"

#endif
