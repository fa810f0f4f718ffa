/* Everything the Python binding sees. */
#ifndef SHARDED_PC_H
#define SHARDED_PC_H

#include "../attach/guest/handle.h"
#include "back/bitmaps.h"
#include "back/return_path.h"
#include "multifd/loop.h"
#include "multifd/packet.h"
#include "multifd/unpack.h"
#include "kernel/alias.h"
#include "kernel/uffd.h"
#include "lab/floor.h"
#include "lab/oracle.h"
#include "lab/page_service.h"
#include "lab/pass.h"
#include "records.h"
#include "shard/place.h"
#include "shard/request.h"
#include "shard/worker.h"
#include "shared/bitmap.h"
#include "shared/control.h"
#include "shared/ring.h"
#include "shared/status.h"
#include "shared/view.h"
#include "stream/discards.h"
#include "stream/guests.h"
#include "stream/hand.h"
#include "stream/ram.h"
#include "stream/straight.h"
#include "stream/stream.h"
#include "stream/sync.h"

#endif
