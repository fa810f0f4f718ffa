/* The suites of test_core.c: each is one function, which returns if all is well. */
#ifndef SUITES_H
#define SUITES_H

void ring_suite(void);
void bitmap_suite(void);
void bell_suite(void);
void control_suite(void);
void stream_suite(void);
void precopy_suite(void);
void route_suite(void);
void records_suite(void);
void encoded_suite(void);
void straight_suite(void);
void return_path_suite(void);
void oracle_suite(void);
void multifd_suite(void);

#endif
