/* As much of QMP as one needs who stands between a monitor and its client: where a message ends,
 * what it is. */
#ifndef SP_QMP_H
#define SP_QMP_H

#include <stdbool.h>
#include <stddef.h>

#include "../guest/message.h"

/* The value of a member of this object itself, not of one within it, as it is written.  False if there
 * is none of that name. */
bool sp_qmp_member(const char *json, size_t len, const char *name, sp_text *value);

/* Is the value this word, a string? */
bool sp_qmp_is(sp_text value, const char *word);

/* Bytes that grow; all zero is an empty one. */
typedef struct sp_bytes {
    char *at;
    size_t len, room;
} sp_bytes;

/* Room for so many more, or NULL. */
char *sp_bytes_more(sp_bytes *bytes, size_t more);
/* Forgets the first n. */
void sp_bytes_drop(sp_bytes *bytes, size_t n);
void sp_bytes_free(sp_bytes *bytes);
/* Nothing but white space. */
bool sp_bytes_blank(const sp_bytes *bytes);

#endif
