/* A model of the promises, for spin: processes ask for the memory of devices, are granted it, use it, give it back and die;
   another program, which does not ask, takes what is free; readings lack something at times.

   What must hold: the sum of what is promised and used never exceeds a device (in `give`), a process that asks for all
   devices is given all or none (in `grant`), and no lease of a living holder is ended (in `drop`).

   As in core.ledger a request is settled in four steps. (1) Read the ledger, and which leases have ended; (2) read the
   devices; (3) in the gate, see that the ledger has not changed, else drop what is over and begin again. If other leases
   have ended, begin again, or count them as held; (4) grant by that reading, and write. Of the rows that are over, some can
   stay: those that do not concern the request. Who has begun again often enough does all of it in the gate. The holder of
   a lease ends it without the gate, at any moment: by a release, after which it may keep its memory for a while, or by
   dying, after which the driver needs a while to take its memory back. Both are the same here.

   RAM is one more device: a request for a GPU and RAM is one for both of them together. Its processes can be read or not, as
   those of a GPU.

   Not in it: two promises of one holder on one device (each process has one row, for one device or for all), order and
   waiting, time, MIG.

   With one of these defined something is wrong, and spin has to find it:
     UNKNOWN_ENDED      a lease that cannot be looked at counts as ended
     DEGRADED_CONSUMED  without a list of processes, what a device has more in use counts as use of what is promised
     LOOK_FIRST         in the gate the devices are read before the leases are looked at
     NO_CHECK           step 3 does not look at the ledger again
     DROP_LATE          a reservation that is over by step 3 is dropped there, after the reading
     PART_OF_GROUP      who asks for all devices is given those that have room
     FIRST_OF_GROUP     the room of the first device alone decides about all that were asked for together
*/
#ifndef PROCESSES
#define PROCESSES 3
#endif
#ifndef DEVICES
#define DEVICES 2
#endif
#ifndef LOOKERS
#define LOOKERS 2                      /* so many settle their requests at once; the others wait, or hold */
#endif
#define TOTAL 2                        /* units of memory on each device */

#define NONE 0
#define WAITS 1
#define GIVEN 2
#define AT(process, device) (process)*DEVICES + (device)
#define BASE(process, device) base[AT(process, device)]
#define EVERY ((1 << DEVICES) - 1)     /* all devices, as a set of bits */
#define IS_OVER(process) (row[process] != NONE && !held[process])
#define HAS(process, device) (row[process] == GIVEN && ((on[process] >> (device)) & 1))
#define USES(process, device) (kept[AT(process, device)] + own[AT(process, device)])

byte row[PROCESSES];                   /* the ledger: each process has at most one row */
byte on[PROCESSES];                    /* the devices that it was given, as a set of bits */
byte need[PROCESSES];                  /* on each device */
bool wants_all[PROCESSES];             /* it is for all devices together */
byte base[PROCESSES*DEVICES];          /* what its holder used there beside, at most */
bool held[PROCESSES];                  /* the kernel: is the lease of its row locked */
bool changed[PROCESSES];               /* was the ledger changed since this process read it */
bool gate;                             /* somebody is in it */

byte own[PROCESSES*DEVICES];           /* the devices: what a process uses of its promise, */
byte kept[PROCESSES*DEVICES];          /* what it uses beside, */
bool outside;                          /* and whether the other program uses a unit of device 0 */
byte looking;                          /* how many will grant by what they have read */

hidden byte i, j, k, d, used, fits;   /* at hand within one step */
hidden short sum;

inline note_change() {
    i = 0;
    do :: i < PROCESSES -> changed[i] = true; i++ :: else -> break od
}

/* What is truly used and promised on a device; `sum` is the answer */
inline demand(device) {
    sum = (device == 0 -> outside : 0); j = 0;
    do
    :: j < PROCESSES ->
        sum = sum + kept[AT(j, device)] + (HAS(j, device) && held[j] -> need[j] : 0);
        j++
    :: else -> break
    od
}

/* Which rows are over, as a set of bits. A lease that is held cannot be looked at sometimes */
inline find_over(found) {
    found = 0; i = 0;
    do
    :: i < PROCESSES ->
        if
        :: IS_OVER(i) -> found = found | (1 << i)
#ifdef UNKNOWN_ENDED
        :: row[i] != NONE && held[i] -> found = found | (1 << i)
#endif
        :: else
        fi;
        i++
    :: else -> break
    od
}

inline drop(found) {
    i = 0;
    do
    :: i < PROCESSES ->
        if
        :: found & (1 << i) ->
            assert(!held[i]);          /* no lease of a living holder is ended */
            row[i] = NONE; on[i] = 0; need[i] = 0; wants_all[i] = false; held[i] = false; d = 0;
            do :: d < DEVICES -> base[AT(i, d)] = 0; d++ :: else -> break od
        :: else
        fi;
        i++
    :: else -> break
    od;
    if :: found -> note_change() :: else fi
}

/* What of a promise is still to come, by a reading of its device; `used` is what is known to be used of it */
inline measure(process, device, whole) {
    used = 0;
    if
    :: whole && USES(process, device) < BASE(process, device) -> BASE(process, device) = USES(process, device)
    :: whole && USES(process, device) > BASE(process, device) -> used = USES(process, device) - BASE(process, device)
#ifdef DEGRADED_CONSUMED
    :: !whole && in_use[device] > BASE(process, device) -> used = in_use[device] - BASE(process, device)
#endif
    :: else
    fi;
    if :: used < need[process] -> to_come[AT(process, device)] = need[process] - used :: else fi
}

/* Read a device: what is in use, and what of the promises on it is to come. The list of processes is whole or not there */
inline look_at(device, whole) {
    in_use[device] = (device == 0 -> outside : 0); j = 0;
    do :: j < PROCESSES -> in_use[device] = in_use[device] + USES(j, device); j++ :: else -> break od;
    j = 0;
    do
    :: j < PROCESSES -> if :: HAS(j, device) -> measure(j, device, whole) :: else fi; j++
    :: else -> break
    od
}

inline look() {
    d = 0;
    do
    :: d < DEVICES -> look_at(d, true); d++
    :: d < DEVICES -> look_at(d, false); d++
    :: d < DEVICES -> in_use[d] = TOTAL; d++      /* nothing can be read: there is no room */
    :: else -> break
    od
}

inline forget_look() {
    looking--; over = 0; d = 0; j = 0;
    do :: d < DEVICES -> in_use[d] = 0; d++ :: else -> break od;
    do :: j < PROCESSES*DEVICES -> to_come[j] = 0; j++ :: else -> break od
}

/* The room on a device by the last look, and by the rows that there are now: `sum` */
inline measure_room(device) {
    sum = TOTAL - in_use[device]; j = 0;
    do
    :: j < PROCESSES -> sum = sum - (HAS(j, device) -> to_come[AT(j, device)] : 0); j++
    :: else -> break
    od
}

/* Give a request a device */
inline give(process, device) {
    row[process] = GIVEN; on[process] = on[process] | (1 << device);
    base[AT(process, device)] = in_use[device]; to_come[AT(process, device)] = need[process];
    note_change();
    demand(device);
    assert(sum <= TOTAL)               /* the sum of what is promised and used never exceeds the device */
}

/* Give a request that is for all devices all of them, or none */
inline grant_all(process) {
    fits = 0; d = 0;
    do
    :: d < DEVICES -> measure_room(d); if :: sum >= need[process] -> fits = fits | (1 << d) :: else fi; d++
    :: else -> break
    od;
#ifdef FIRST_OF_GROUP
    if :: fits & 1 -> fits = EVERY :: else fi;
#endif
#ifndef PART_OF_GROUP
    if :: fits != EVERY -> fits = 0 :: else fi;
#endif
    d = 0;
    do
    :: d < DEVICES -> if :: (fits >> d) & 1 -> give(process, d) :: else fi; d++
    :: else -> break
    od;
    assert(on[process] == 0 || on[process] == EVERY)
}

/* Give each request that waits a device that has room for it, any of them */
inline grant() {
    k = 0;
    do
    :: k < PROCESSES && row[k] == WAITS && wants_all[k] -> grant_all(k); k++
    :: k < PROCESSES && !(row[k] == WAITS && wants_all[k]) ->
        d = 0;
        do
        :: d < DEVICES ->
            measure_room(d);
            if
            :: row[k] == WAITS && sum >= need[k] -> give(k, d)
            :: row[k] == WAITS && sum >= need[k] && d + 1 < DEVICES   /* it is given another one, or waits */
            :: else
            fi;
            d++
        :: else -> break
        od;
        k++
    :: else -> break
    od
}

/* Add those that are over by now and wait: nothing is promised to them. Forget some of those that are over, or none */
inline choose_over() {
    i = 0;
    do
    :: i < PROCESSES ->
        if
#ifdef DROP_LATE
        :: (again >> i) & 1 -> over = over | (1 << i)
#else
        :: (again >> i) & 1 && row[i] == WAITS -> over = over | (1 << i)
#endif
        :: (over >> i) & 1 && i != me -> over = over & ~(1 << i)
        :: true
        fi;
        i++
    :: else -> break
    od
}

/* Drop what is over, enter the request of this process, hand out, and write the ledger */
inline apply() {
    drop(over);
    if
    :: asked && row[me] == NONE ->
        row[me] = WAITS; wants_all[me] = asked > TOTAL; need[me] = (asked > TOTAL -> asked - TOTAL : asked);
        held[me] = true; asked = 0
    :: else
    fi;
    grant();
    forget_look()
}

/* The kernel ends its lease; what it uses stays in use until it is freed */
inline end_lease() {
    d = 0;
    do
    :: d < DEVICES -> kept[AT(me, d)] = kept[AT(me, d)] + own[AT(me, d)]; own[AT(me, d)] = 0; d++
    :: else -> break
    od;
    held[me] = false; asked = 0; d = 0
}

proctype Process(byte me) {
    byte over, again, asked, in_use[DEVICES], to_come[PROCESSES*DEVICES];

idle:
    do
    :: atomic { kept[AT(me, 0)] -> kept[AT(me, 0)] = 0 }
    :: atomic { DEVICES > 1 && kept[AT(me, DEVICES - 1)] -> kept[AT(me, DEVICES - 1)] = 0 }
    :: atomic { asked = 1; goto settle }
    :: atomic { asked = TOTAL; goto settle }
    :: atomic { DEVICES > 1 -> asked = TOTAL + 1; goto settle }   /* one unit on each device */
    :: atomic { DEVICES > 1 -> asked = 2*TOTAL; goto settle }
    od;

settle:
    if
    :: atomic { looking < LOOKERS -> looking++; changed[me] = false; find_over(over) }
    :: atomic { looking < LOOKERS && !gate -> looking++; gate = true; goto in_gate }
    :: atomic { end_lease(); goto idle }
    fi;
    if
    :: atomic { look() }
    :: atomic { end_lease(); forget_look(); goto idle }
    fi;
    if
    :: atomic { !gate ->
        find_over(again);
#ifdef NO_CHECK
        changed[me] = false;
#endif
        if
        :: changed[me] || again != over -> drop(again); forget_look(); again = 0; goto settle
        :: !changed[me] -> choose_over(); again = 0; apply(); goto wait
        fi }
    :: atomic { end_lease(); forget_look(); goto idle }
    fi;

in_gate:
#ifndef LOOK_FIRST
    atomic { find_over(over) };
    atomic { look() };
#else
    atomic { look() };
    atomic { find_over(over) };
#endif
    if
    :: atomic { apply(); gate = false }
    :: atomic { end_lease(); forget_look(); gate = false; goto idle }
    fi;

wait:
    if
    :: atomic { row[me] != GIVEN || !held[me] -> goto settle }   /* a row of before has to go first */
    :: atomic { row[me] == GIVEN && held[me] }
    fi;

    do                                 /* it holds */
    :: atomic { on[me] & 1 -> own[AT(me, 0)] = need[me] - own[AT(me, 0)] }
    :: atomic { DEVICES > 1 && (on[me] >> (DEVICES - 1)) & 1 ->
        own[AT(me, DEVICES - 1)] = need[me] - own[AT(me, DEVICES - 1)] }
    :: atomic { end_lease(); goto idle }
    od
}

/* Takes what is neither used nor promised. What it takes while somebody grants by a reading cannot be known to anybody */
proctype Outsider() {
    do
    :: atomic { !looking && !outside -> demand(0); if :: sum < TOTAL -> outside = true :: else fi }
    :: atomic { outside = false }
    od
}

init {
    byte p = 0;
    atomic {
        do :: p < PROCESSES -> run Process(p); p++ :: else -> break od;
        run Outsider();
        p = 0
    }
}
