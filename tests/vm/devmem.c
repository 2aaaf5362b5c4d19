/*
 * Device memory TCP of Linux by its raw interface: generic netlink, recvmsg(), setsockopt() and sendmsg() by hand, with a udmabuf as the
 * device's memory. Every received byte is compared with the pattern that the sender sends. It knows nothing of the library.
 *
 * devmem receive --nic NAME --queue N [...]    binds an area to a queue, accepts, receives until the senders end
 * devmem send --to ADDRESS [--nic NAME] [...]  sends; with --nic from device memory
 *
 * Exit status: 0 done and every byte right, 1 a wrong byte or an error, 3 the kernel refused a binding (its text is printed).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/errqueue.h>
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <linux/udmabuf.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* The interface's numbers: the C library's headers may be older than it. */
enum { BIND_RX = 13, BIND_TX = 15 };
enum { DMABUF_IFINDEX = 1, DMABUF_QUEUES = 2, DMABUF_FD = 3, DMABUF_ID = 4 };
enum { QUEUE_ID = 1, QUEUE_TYPE = 3, QUEUE_TYPE_RX = 0 };
enum { OPTION_DONTNEED = 80, CONTROL_LINEAR = 78, CONTROL_DMABUF = 79 };
#define RECEIVE_DEVMEM 0x2000000
struct fragment {
	uint64_t offset;
	uint32_t size, token, binding, flags;
};
struct token_range {
	uint32_t first, count;
};
#define MOST_RANGES 128
#define MOST_TOKENS 1024

#define PERIOD 1048573
#define STREAM_STEP 104729
#define FIRST_SOURCE_PORT 40000
#define MOST_CONNECTIONS 16
#define MOST_BYTES (256 << 10)
#define MOST_FRAGMENTS 512

struct options {
	const char *nic, *to, *go;
	int queue, port, connections, stall, hoard, stream, user;
	size_t vector, fragments, area, bytes, chunk, buffer, kill_owner_after, pause_at;
	double limit, late;
	bool without_flag;
};

static uint8_t pattern[2 * PERIOD];

static void fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	putchar('\n');
	fflush(stdout);
	exit(1);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void make_pattern(void)
{
	uint64_t state = 88172645463325252u;

	for (size_t i = 0; i < PERIOD; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		pattern[i] = pattern[i + PERIOD] = state;
	}
}

/* The pattern of a stream at a position; valid for PERIOD bytes. */
static const uint8_t *expected(int stream, size_t position)
{
	return pattern + (position + (size_t)stream * STREAM_STEP) % PERIOD;
}

/* Device memory: a dma-buf over pages of a memory file. */

struct area {
	uint8_t *bytes;
	size_t size;
	int dmabuf;
};

static struct area make_area(size_t size)
{
	struct area area = {.size = size};
	struct udmabuf_create create = {.flags = UDMABUF_FLAGS_CLOEXEC, .size = size};
	int device = open("/dev/udmabuf", O_RDWR | O_CLOEXEC), file = memfd_create("area", MFD_ALLOW_SEALING | MFD_CLOEXEC);

	if (device < 0 || file < 0 || ftruncate(file, size) || fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK))
		fail("udmabuf: %m");
	create.memfd = file;
	area.dmabuf = ioctl(device, UDMABUF_CREATE, &create);
	area.bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (area.dmabuf < 0 || area.bytes == MAP_FAILED)
		fail("udmabuf: %m");
	close(device);
	close(file);
	return area;
}

/* Generic netlink. */

struct message {
	struct nlmsghdr header;
	struct genlmsghdr generic;
	uint8_t attributes[1024];
};

static void put(struct message *message, int type, const void *value, size_t size)
{
	struct nlattr *attribute = (void *)((uint8_t *)message + NLMSG_ALIGN(message->header.nlmsg_len));

	attribute->nla_type = type;
	attribute->nla_len = NLA_HDRLEN + size;
	memcpy((uint8_t *)attribute + NLA_HDRLEN, value, size);
	message->header.nlmsg_len = NLMSG_ALIGN(message->header.nlmsg_len) + NLA_ALIGN(attribute->nla_len);
}

static void put_number(struct message *message, int type, uint32_t value) { put(message, type, &value, sizeof(value)); }

static const struct nlattr *find(const uint8_t *from, size_t length, int type)
{
	while (length >= NLA_HDRLEN) {
		const struct nlattr *attribute = (const void *)from;
		size_t size = NLA_ALIGN(attribute->nla_len);

		if (attribute->nla_len < NLA_HDRLEN || attribute->nla_len > length)
			return NULL;
		if ((attribute->nla_type & NLA_TYPE_MASK) == type)
			return attribute;
		if (size >= length)
			return NULL;
		from += size;
		length -= size;
	}
	return NULL;
}

/* Sends a request and returns the attribute of its answer as a number of `size` bytes; -1, with the kernel's text printed: refused. */
static int64_t ask(int socket, struct message *message, int type, size_t size)
{
	uint8_t answer[8192];
	struct nlmsghdr *header = (void *)answer;
	ssize_t length;
	uint32_t value = 0;

	message->header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
	if (send(socket, message, message->header.nlmsg_len, 0) < 0)
		fail("netlink: %m");
	length = recv(socket, answer, sizeof(answer), 0);
	if (length < NLMSG_HDRLEN)
		fail("netlink: %m");
	if (header->nlmsg_type == NLMSG_ERROR) {
		const struct nlmsgerr *error = NLMSG_DATA(header);
		size_t skipped = sizeof(*error) + (header->nlmsg_flags & NLM_F_CAPPED ? 0 : error->msg.nlmsg_len - NLMSG_HDRLEN);
		const struct nlattr *text = header->nlmsg_flags & NLM_F_ACK_TLVS
						    ? find((const uint8_t *)error + skipped, header->nlmsg_len - NLMSG_HDRLEN - skipped, NLMSGERR_ATTR_MSG)
						    : NULL;

		printf("refused: %s: %s\n", strerror(-error->error), text ? (const char *)text + NLA_HDRLEN : "the kernel says no more");
		return -1;
	}
	const struct nlattr *found = find((uint8_t *)NLMSG_DATA(header) + GENL_HDRLEN, header->nlmsg_len - NLMSG_HDRLEN - GENL_HDRLEN, type);

	if (!found)
		fail("netlink: the answer lacks attribute %d", type);
	memcpy(&value, (const uint8_t *)found + NLA_HDRLEN, size);
	/* The acknowledgement. */
	recv(socket, answer, sizeof(answer), MSG_DONTWAIT);
	return value;
}

static struct message request(int family, int command, int version)
{
	struct message message = {.header = {.nlmsg_type = family, .nlmsg_len = NLMSG_HDRLEN + GENL_HDRLEN}, .generic = {.cmd = command, .version = version}};

	return message;
}

/* The binding lasts as long as the returned netlink socket. Exits with 3 if it is refused. */
static int bind_area(const struct options *options, const struct area *area, int command, uint32_t *id)
{
	int socket_ = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC), yes = 1;
	struct message message = request(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 2);
	int64_t answer;

	setsockopt(socket_, SOL_NETLINK, NETLINK_EXT_ACK, &yes, sizeof(yes));
	put(&message, CTRL_ATTR_FAMILY_NAME, "netdev", sizeof("netdev"));
	answer = ask(socket_, &message, CTRL_ATTR_FAMILY_ID, sizeof(uint16_t));
	if (answer < 0)
		exit(3);
	message = request(answer, command, 1);
	put_number(&message, DMABUF_IFINDEX, if_nametoindex(options->nic));
	if (command == BIND_RX) {
		struct message queue = request(0, 0, 0);
		size_t empty = queue.header.nlmsg_len;

		put_number(&queue, QUEUE_ID, options->queue);
		put_number(&queue, QUEUE_TYPE, QUEUE_TYPE_RX);
		put(&message, DMABUF_QUEUES | NLA_F_NESTED, (uint8_t *)&queue + empty, queue.header.nlmsg_len - empty);
	}
	put_number(&message, DMABUF_FD, area->dmabuf);
	answer = ask(socket_, &message, DMABUF_ID, sizeof(uint32_t));
	if (answer < 0)
		exit(3);
	*id = answer;
	return socket_;
}

/* Receiving. */

struct totals {
	size_t device, linear, plain, fragments, smallest, largest, unaligned;
};

struct connection {
	int socket, stream;
	size_t position;
	bool ended;
	size_t tokens;
	uint32_t token[MOST_TOKENS];
	struct totals totals;
};

static void compare(const struct connection *connection, size_t position, const uint8_t *bytes, size_t length, const char *kind)
{
	const uint8_t *right = expected(connection->stream, position);

	if (!memcmp(bytes, right, length))
		return;
	for (size_t i = 0; i < length; i++)
		if (bytes[i] != right[i])
			fail("stream %d: a wrong byte at %zu of %s bytes, %zu into a piece of %zu: %02x instead of %02x", connection->stream, position + i, kind, i, length,
			     bytes[i], right[i]);
}

static void give_back(struct connection *connection)
{
	for (size_t from = 0; from < connection->tokens;) {
		struct token_range ranges[MOST_RANGES];
		size_t count = 0, named = 0;

		for (; from < connection->tokens; from++, named++) {
			uint32_t token = connection->token[from];

			if (count && ranges[count - 1].first + ranges[count - 1].count == token)
				ranges[count - 1].count++;
			else if (count < MOST_RANGES)
				ranges[count++] = (struct token_range){token, 1};
			else
				break;
		}
		int freed = setsockopt(connection->socket, SOL_SOCKET, OPTION_DONTNEED, ranges, count * sizeof(*ranges));

		if (freed != (int)named)
			fail("stream %d: %zu fragments were given back, the kernel took %d: %m", connection->stream, named, freed);
	}
	connection->tokens = 0;
}

/* One call of recvmsg(). */
static void receive_some(struct connection *connection, const struct options *options, const struct area *area, uint32_t binding)
{
	static uint8_t bytes[MOST_BYTES], control[CMSG_SPACE(sizeof(struct fragment)) * MOST_FRAGMENTS];
	struct iovec vector = {bytes, options->vector};
	struct msghdr message = {
		.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = CMSG_SPACE(sizeof(struct fragment)) * options->fragments};
	ssize_t length = recvmsg(connection->socket, &message, (options->without_flag ? 0 : RECEIVE_DEVMEM) | MSG_DONTWAIT);
	size_t done = 0, copied = 0;
	struct totals *totals = &connection->totals;

	if (length < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (length < 0)
		fail("stream %d: recvmsg after %zu bytes: %m", connection->stream, connection->position);
	if (length > (ssize_t)options->vector)
		fail("stream %d: %zd bytes, more than the vector's", connection->stream, length);
	if (length == 0) {
		connection->ended = true;
		return;
	}
	for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head)) {
		struct fragment fragment;

		if (head->cmsg_level != SOL_SOCKET || (head->cmsg_type != CONTROL_DMABUF && head->cmsg_type != CONTROL_LINEAR))
			continue;
		memcpy(&fragment, CMSG_DATA(head), sizeof(fragment));
		if (head->cmsg_type == CONTROL_LINEAR) {
			if (copied + fragment.size > sizeof(bytes))
				fail("stream %d: more linear bytes than the buffer holds", connection->stream);
			compare(connection, connection->position + done, bytes + copied, fragment.size, "linear");
			copied += fragment.size;
			totals->linear += fragment.size;
		} else {
			if (fragment.binding != binding)
				fail("stream %d: a fragment of binding %u, ours is %u", connection->stream, fragment.binding, binding);
			if (fragment.offset > area->size || fragment.size > area->size - fragment.offset)
				fail("stream %d: fragment %lu+%u is outside of the area", connection->stream, (unsigned long)fragment.offset, fragment.size);
			compare(connection, connection->position + done, area->bytes + fragment.offset, fragment.size, "device");
			totals->device += fragment.size;
			totals->fragments++;
			totals->unaligned += fragment.offset % 4096 != 0;
			if (!totals->smallest || fragment.size < totals->smallest)
				totals->smallest = fragment.size;
			if (fragment.size > totals->largest)
				totals->largest = fragment.size;
			if (connection->tokens == MOST_TOKENS)
				fail("stream %d: more fragments are kept than fit", connection->stream);
			connection->token[connection->tokens++] = fragment.token;
		}
		done += fragment.size;
	}
	if (!done) {
		compare(connection, connection->position, bytes, length, "plain");
		totals->plain += length;
	} else if (done != (size_t)length) {
		fail("stream %d: recvmsg returned %zd, its fragments are %zu bytes", connection->stream, length, done);
	}
	connection->position += length;
	if (connection->stream != options->hoard)
		give_back(connection);
}

static int listen_on(const struct options *options)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(options->port)};
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1, buffer = options->buffer;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
	if (buffer && setsockopt(listener, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof(buffer)))
		fail("receive buffer: %m");
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, MOST_CONNECTIONS))
		fail("listen: %m");
	return listener;
}

/* Another process makes the binding and owns it. */
static pid_t start_owner(const struct options *options, const struct area *area, uint32_t *id)
{
	int ends[2];
	pid_t owner;

	if (pipe(ends))
		fail("pipe: %m");
	owner = fork();
	if (!owner) {
		bind_area(options, area, BIND_RX, id);
		if (write(ends[1], id, sizeof(*id)) != sizeof(*id))
			exit(1);
		for (;;)
			pause();
	}
	close(ends[1]);
	if (owner < 0 || read(ends[0], id, sizeof(*id)) != sizeof(*id))
		exit(3);
	close(ends[0]);
	return owner;
}

static int receive(const struct options *options)
{
	struct area area = make_area(options->area);
	struct connection *connections = calloc(MOST_CONNECTIONS, sizeof(*connections));
	uint32_t binding;
	pid_t owner = 0;
	int count = 0, listener, ended = 0;
	double until = now() + options->limit, began = 0;
	size_t all = 0;

	if (options->kill_owner_after)
		owner = start_owner(options, &area, &binding);
	else
		bind_area(options, &area, BIND_RX, &binding);
	listener = listen_on(options);
	printf("bound %zu bytes to queue %d of %s: binding %u\n", area.size, options->queue, options->nic, binding);
	fflush(stdout);
	while (ended < options->connections) {
		struct pollfd polled[MOST_CONNECTIONS + 1] = {{.fd = listener, .events = POLLIN}};
		bool stalled = false;

		for (int i = 0; i < count; i++) {
			/* The connection that is to stall is read again when all others have ended, or time is up. */
			stalled = connections[i].stream == options->stall && !connections[i].ended && ended < options->connections - 1 && now() < until;
			polled[i + 1] = (struct pollfd){.fd = connections[i].ended || stalled ? -1 : connections[i].socket, .events = POLLIN};
		}
		int ready = poll(polled, count + 1, 1000);

		if (ready < 0)
			fail("poll: %m");
		/* Its fragments fill the area, and nothing moves any more. Closing gives them back. */
		for (int i = 0; i < count && !ready; i++) {
			if (connections[i].stream == options->hoard && !connections[i].ended && connections[i].tokens) {
				printf("note: stream %d was closed with %zu fragments, %zu bytes of another had arrived\n", connections[i].stream,
				       connections[i].tokens, all - connections[i].position);
				close(connections[i].socket);
				connections[i].ended = true;
				ended++;
			}
		}
		if (polled[0].revents && count < MOST_CONNECTIONS) {
			struct sockaddr_in peer;
			socklen_t length = sizeof(peer);

			connections[count].socket = accept4(listener, (struct sockaddr *)&peer, &length, SOCK_CLOEXEC);
			/* Senders of this program say by their port which stream theirs is; others send the first. */
			connections[count].stream = ntohs(peer.sin_port) - FIRST_SOURCE_PORT;
			if (connections[count].stream < 0 || connections[count].stream >= MOST_CONNECTIONS)
				connections[count].stream = 0;
			if (!count++)
				began = now();
		}
		all = 0;
		for (int i = 0; i < count; i++) {
			if (i + 1 < MOST_CONNECTIONS + 1 && polled[i + 1].fd >= 0 && polled[i + 1].revents && !connections[i].ended) {
				receive_some(&connections[i], options, &area, binding);
				ended += connections[i].ended;
			}
			all += connections[i].position;
		}
		if (owner && all >= options->kill_owner_after) {
			kill(owner, SIGKILL);
			waitpid(owner, NULL, 0);
			printf("the owner of the binding was killed after %zu bytes\n", all);
			owner = 0;
		}
		if (now() > until) {
			for (int i = 0; i < count; i++)
				printf("stream %d: %zu bytes when time was up\n", connections[i].stream, connections[i].position);
			printf("time is up\n");
			fflush(stdout);
			return 1;
		}
	}
	for (int i = 0; i < count; i++) {
		struct totals *totals = &connections[i].totals;

		printf("stream %d: %zu bytes right: device %zu in %zu fragments of %zu to %zu, %zu of them unaligned; linear %zu; plain %zu\n", connections[i].stream,
		       connections[i].position, totals->device, totals->fragments, totals->smallest, totals->largest, totals->unaligned, totals->linear, totals->plain);
		if (options->bytes && connections[i].stream != options->hoard && connections[i].position != options->bytes)
			fail("stream %d: %zu bytes instead of %zu", connections[i].stream, connections[i].position, options->bytes);
	}
	printf("received %zu bytes in %.1f s\n", all, now() - began);
	if (owner)
		kill(owner, SIGKILL);
	return 0;
}

/* Sending. */

static int connect_to(const struct options *options)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(options->port)};
	struct sockaddr_in source = {.sin_family = AF_INET, .sin_port = htons(FIRST_SOURCE_PORT + options->stream)};
	int stream = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
	double until = now() + 10;

	inet_pton(AF_INET, options->to, &address.sin_addr);
	setsockopt(stream, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
	if (bind(stream, (struct sockaddr *)&source, sizeof(source)) || setsockopt(stream, SOL_SOCKET, SO_ZEROCOPY, &yes, sizeof(yes)))
		fail("source port: %m");
	while (connect(stream, (struct sockaddr *)&address, sizeof(address)))
		if (now() > until || usleep(100000))
			fail("connect: %m");
	return stream;
}

/* Calls of sendmsg() with device memory: accepted, complete, refused, and of the complete ones those that the kernel called copied. */
struct calls {
	uint32_t made, done, refused, called_copied;
};

/*
 * Waits up to `milliseconds` for completions. No kernel copies device memory. Once a call was refused for lack of a route, the kernel may
 * say of earlier calls, whose packets were not sent yet, that it copied them: see README.md.
 */
static void complete(int stream, struct calls *calls, int milliseconds)
{
	struct pollfd polled = {.fd = stream};
	uint8_t control[256];
	struct msghdr message = {.msg_control = control, .msg_controllen = sizeof(control)};

	if (milliseconds)
		poll(&polled, 1, milliseconds);
	while (message.msg_controllen = sizeof(control), recvmsg(stream, &message, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0) {
		for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head)) {
			struct sock_extended_err error;

			memcpy(&error, CMSG_DATA(head), sizeof(error));
			if (error.ee_origin != SO_EE_ORIGIN_ZEROCOPY)
				fail("send: %s", strerror(error.ee_errno));
			if (error.ee_code & SO_EE_CODE_ZEROCOPY_COPIED) {
				if (!calls->refused)
					fail("send: the kernel says that it copied device memory, and has refused no call");
				calls->called_copied += error.ee_data + 1 - error.ee_info;
			}
			if (error.ee_data + 1 > calls->done)
				calls->done = error.ee_data + 1;
		}
	}
}

/* Something is to happen in the middle of a transfer: the sender waits for a file that says so. */
static void pause_once(struct options *options, size_t sent)
{
	if (!options->pause_at || sent < options->pause_at)
		return;
	options->pause_at = 0;
	while (access(options->go, F_OK))
		usleep(20000);
}

/*
 * While its NIC is down a connection has no route. It lasts, and so do the refusals (ENODEV): the kernel looks for a route when it sends
 * something on the connection, and not when it is asked to send device memory. A probe for a live peer is enough. If it finds no route, the
 * refusals become EHOSTUNREACH, and the first call after the NIC is up again fails with EINVAL.
 */
static void seek_route(int stream)
{
	int one = 1;

	if (setsockopt(stream, IPPROTO_TCP, TCP_KEEPIDLE, &one, sizeof(one)) || setsockopt(stream, IPPROTO_TCP, TCP_KEEPINTVL, &one, sizeof(one)) ||
	    setsockopt(stream, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one)))
		fail("probes: %m");
}

/* From device memory: slots of one chunk each, beginning at odd places; a slot is filled again when its call is complete. */
static void send_device(struct options *options, int stream)
{
	size_t stride = options->chunk + 4096, slots = options->area / stride, sent = 0;
	struct area area = make_area(options->area);
	double until = now() + options->limit;
	uint32_t binding, unreachable = 0, invalid = 0, *last = calloc(slots, sizeof(*last));
	struct calls calls = {};

	bind_area(options, &area, BIND_TX, &binding);
	printf("sends from %zu bytes, binding %u\n", area.size, binding);
	for (size_t slot = 0; sent < options->bytes; slot = (slot + 1) % slots) {
		size_t begin = slot * stride + (slot * 613 + 7) % 4096, length = options->bytes - sent < options->chunk ? options->bytes - sent : options->chunk;

		while (calls.done < last[slot])
			complete(stream, &calls, 1000);
		memcpy(area.bytes + begin, expected(options->stream, sent), length);
		for (size_t put = 0; put < length;) {
			uint8_t control[CMSG_SPACE(sizeof(uint32_t))] = {};
			struct iovec vector = {(void *)(begin + put), length - put};
			struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
			struct cmsghdr *head = CMSG_FIRSTHDR(&message);
			ssize_t accepted;

			head->cmsg_level = SOL_SOCKET;
			head->cmsg_type = CONTROL_DMABUF;
			head->cmsg_len = CMSG_LEN(sizeof(uint32_t));
			memcpy(CMSG_DATA(head), &binding, sizeof(binding));
			accepted = sendmsg(stream, &message, MSG_ZEROCOPY | MSG_NOSIGNAL);
			if (accepted < 0 && errno == ENOBUFS) {
				complete(stream, &calls, 1000);
				continue;
			}
			if (accepted < 0 && (errno == ENODEV || errno == EHOSTUNREACH || (errno == EINVAL && calls.refused)) && now() < until) {
				unreachable += errno == EHOSTUNREACH;
				invalid += errno == EINVAL;
				if (!calls.refused++)
					seek_route(stream);
				usleep(50000);
				continue;
			}
			if (accepted < 0)
				fail("sendmsg after %zu bytes: %m", sent + put);
			put += accepted;
			calls.made++;
		}
		last[slot] = calls.made;
		sent += length;
		complete(stream, &calls, 0);
		pause_once(options, sent);
	}
	while (calls.done < calls.made)
		complete(stream, &calls, 1000);
	printf("note: %u calls of sendmsg complete, %u of them called copied, %u refused and made again: %u ENODEV, %u EHOSTUNREACH, %u EINVAL\n", calls.made,
	       calls.called_copied, calls.refused, calls.refused - unreachable - invalid, unreachable, invalid);
}

static int transmit(struct options *options)
{
	int stream = connect_to(options);
	size_t sent = 0;

	/* The rule of a connection may be set after it. */
	usleep(options->late * 1e6);
	if (options->nic) {
		send_device(options, stream);
		sent = options->bytes;
	}
	while (sent < options->bytes) {
		size_t length = options->bytes - sent < options->chunk ? options->bytes - sent : options->chunk;
		ssize_t accepted = send(stream, expected(options->stream, sent), length, MSG_NOSIGNAL);

		if (accepted < 0)
			fail("send after %zu bytes: %m", sent);
		sent += accepted;
		pause_once(options, sent);
	}
	shutdown(stream, SHUT_WR);
	/* Until the receiver has taken everything. */
	if (recv(stream, &sent, 1, 0) < 0)
		fail("the receiver ended: %m");
	close(stream);
	printf("sent %zu bytes from %s\n", options->bytes, options->nic ? "device memory" : "host memory");
	return 0;
}

int main(int count, char **words)
{
	struct options options = {.port = 5000, .connections = 1, .stall = -1, .hoard = -1, .area = 8 << 20, .chunk = 128 << 10, .limit = 60, .vector = MOST_BYTES, .fragments = MOST_FRAGMENTS};
	static const struct option names[] = {
		{"nic", 1, 0, 'n'}, {"to", 1, 0, 't'}, {"queue", 1, 0, 'q'}, {"port", 1, 0, 'p'}, {"connections", 1, 0, 'c'}, {"stall", 1, 0, 's'}, {"hoard", 1, 0, 'h'},
		{"stream", 1, 0, 'S'}, {"area", 1, 0, 'a'}, {"bytes", 1, 0, 'b'}, {"chunk", 1, 0, 'k'}, {"buffer", 1, 0, 'B'}, {"kill-owner-after", 1, 0, 'K'},
		{"seconds", 1, 0, 'l'}, {"late", 1, 0, 'L'}, {"user", 1, 0, 'u'},
		{"vector", 1, 0, 'v'}, {"fragments", 1, 0, 'f'}, {"without-flag", 0, 0, 'w'}, {"pause-at", 1, 0, 'P'}, {"go", 1, 0, 'g'}, {},
	};
	int option;

	while ((option = getopt_long(count, words, "", names, NULL)) != -1) {
		switch (option) {
		case 'n': options.nic = optarg; break;
		case 't': options.to = optarg; break;
		case 'q': options.queue = atoi(optarg); break;
		case 'p': options.port = atoi(optarg); break;
		case 'c': options.connections = atoi(optarg); break;
		case 's': options.stall = atoi(optarg); break;
		case 'h': options.hoard = atoi(optarg); break;
		case 'S': options.stream = atoi(optarg); break;
		case 'a': options.area = atol(optarg); break;
		case 'b': options.bytes = atol(optarg); break;
		case 'k': options.chunk = atol(optarg); break;
		case 'B': options.buffer = atol(optarg); break;
		case 'K': options.kill_owner_after = atol(optarg); break;
		case 'l': options.limit = atof(optarg); break;
		case 'v': options.vector = atol(optarg); break;
		case 'f': options.fragments = atol(optarg); break;
		case 'w': options.without_flag = true; break;
		case 'P': options.pause_at = atol(optarg); break;
		case 'g': options.go = optarg; break;
		case 'u': options.user = atoi(optarg); break;
		case 'L': options.late = atof(optarg); break;
		default: return 2;
		}
	}
	make_pattern();
	if (options.user && (setresgid(options.user, options.user, options.user) || setresuid(options.user, options.user, options.user)))
		fail("user %d: %m", options.user);
	if (optind + 1 < count && !strcmp(words[optind], "run")) {
		execvp(words[optind + 1], words + optind + 1);
		fail("%s: %m", words[optind + 1]);
	}
	if (optind < count && !strcmp(words[optind], "receive") && options.nic && options.vector <= MOST_BYTES && options.fragments <= MOST_FRAGMENTS)
		return receive(&options);
	if (optind < count && !strcmp(words[optind], "send") && options.to && options.chunk < PERIOD && !options.pause_at == !options.go)
		return transmit(&options);
	fail("usage: devmem receive --nic NAME --queue N [...] | devmem send --to ADDRESS [--nic NAME] [...]");
	return 2;
}
