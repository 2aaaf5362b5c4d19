// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * A pair of network devices, vmnic0 and vmnic1, joined by a wire, for tests of device memory TCP without hardware. What one sends the
 * other receives; each may be moved into a network namespace.
 *
 * A device has what the kernel asks of a NIC for device memory: queues that restart alone, page pools that may hold memory which the CPU
 * cannot read, header split, an indirection table and steering rules, and transmission of device memory. Its DMA is memcpy() on the
 * DMA addresses: those of a udmabuf are ordinary memory. So it needs a machine without an IOMMU.
 *
 * This file is part of libuccl_p2p and is original work. It is licensed under the MIT license or the GPL, version 2, at your choice: as a module of
 * the kernel it calls functions that are exported to GPL-compatible modules only. It is built for tests and is never part of a package.
 */
#include <linux/dma-direct.h>
#include <linux/dma-mapping.h>
#include <linux/etherdevice.h>
#include <linux/ethtool.h>
#include <linux/ip.h>
#include <linux/jhash.h>
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/platform_device.h>
#include <linux/rtnetlink.h>
#include <linux/tcp.h>
#include <linux/version.h>
#include <net/ip.h>
#include <net/netdev_queues.h>
#include <net/netdev_rx_queue.h>
#include <net/page_pool/helpers.h>

#define NIC "uccl_vmnic"
#define QUEUES 4
#define RULES 32
#define TABLE 128
/* Frames of the peer that a queue holds at most before it loses some. */
#define BACKLOG 512
/* A received packet has at most so many fragments: below MAX_SKB_FRAGS, since the linear part may need one when packets are merged. */
#define FRAGMENTS 16
#define COPIED_HEAD 256

static unsigned int fragment = PAGE_SIZE;
module_param(fragment, uint, 0444);
MODULE_PARM_DESC(fragment, "bytes of payload that the NIC puts into one page");
static unsigned int offset;
module_param(offset, uint, 0444);
MODULE_PARM_DESC(offset, "where in its page a fragment begins");
static unsigned int drop_every;
module_param(drop_every, uint, 0644);
MODULE_PARM_DESC(drop_every, "each so manieth packet with payload is lost on the wire; 0: none");
static unsigned int unsplit_every;
module_param(unsplit_every, uint, 0644);
MODULE_PARM_DESC(unsplit_every, "each so manieth packet keeps payload in its linear part, though header split is on; 0: none");
static unsigned int unsplit_bytes = 100;
module_param(unsplit_bytes, uint, 0644);
MODULE_PARM_DESC(unsplit_bytes, "how much payload such a packet keeps there, at most 1000");
static unsigned int unwritten_every;
module_param(unwritten_every, uint, 0644);
MODULE_PARM_DESC(unwritten_every, "each so manieth fragment of device memory is announced though nothing was written: a platform that loses DMA silently; 0: none");

static unsigned int split_threshold;
module_param(split_threshold, uint, 0444);
MODULE_PARM_DESC(split_threshold, "hds-thresh of a new NIC: smaller payload is not split from its headers");
static bool loop;
module_param(loop, bool, 0444);
MODULE_PARM_DESC(loop, "a NIC receives what it sends itself, so that both ends of a connection may be in one process");

enum counter { STARVED, LOST, UNSPLIT, BAD_CHECKSUM, OVERRUN, DEVICE_BYTES, COUNTERS };

static const char counter_names[COUNTERS][ETH_GSTRING_LEN] = {
	"rx_starved", "rx_lost_on_purpose", "rx_left_unsplit", "rx_bad_checksum", "rx_overrun", "tx_device_memory_bytes",
};
static const char queue_counter_names[][ETH_GSTRING_LEN] = { "packets", "bytes", "device_memory_bytes" };
#define QUEUE_COUNTERS ARRAY_SIZE(queue_counter_names)

/* What restarting a queue replaces. */
struct memory {
	struct page_pool *pool;
};

struct queue {
	struct napi_struct napi;
	/* What the peer has sent: its own packets, until they are copied. */
	struct sk_buff_head arrived;
	struct memory memory;
	atomic64_t counters[QUEUE_COUNTERS];
};

struct nic {
	struct net_device *dev;
	struct nic *peer;
	struct platform_device *parent;
	bool split;
	unsigned int threshold;
	u32 table[TABLE];
	struct ethtool_rx_flow_spec rules[RULES];
	bool rule_set[RULES];
	struct queue queues[QUEUES];
	atomic64_t counters[COUNTERS];
	/* Of which the parameters choose some. */
	atomic_t packets, fragments;
	atomic64_t sent_packets, sent_bytes;
};

static struct nic *nics[2];

/* Reading what was sent. */

static void *at_dma_address(struct nic *nic, dma_addr_t address)
{
	return phys_to_virt(dma_to_phys(&nic->parent->dev, address));
}

/* read_packet: as skb_copy_bits(), of memory that only the NIC can read too */
static void read_packet(struct nic *sender, const struct sk_buff *skb, unsigned int at, void *to, unsigned int length)
{
	unsigned int head = skb_headlen(skb), part;
	int i;

	if (at < head) {
		part = min(length, head - at);
		memcpy(to, skb->data + at, part);
		to += part;
		at += part;
		length -= part;
	}
	at -= head;
	for (i = 0; length && i < skb_shinfo(skb)->nr_frags; i++) {
		const skb_frag_t *frag = &skb_shinfo(skb)->frags[i];
		unsigned int size = skb_frag_size(frag);

		if (at >= size) {
			at -= size;
			continue;
		}
		part = min(length, size - at);
		if (skb_frag_is_net_iov(frag)) {
			netmem_ref netmem = skb_frag_netmem(frag);

			memcpy(to, at_dma_address(sender, page_pool_get_dma_addr_netmem(netmem) + skb_frag_off(frag) + at), part);
			atomic64_add(part, &sender->counters[DEVICE_BYTES]);
		} else {
			unsigned int from = skb_frag_off(frag) + at, done = 0;

			while (done < part) {
				struct page *page = skb_frag_page(frag) + ((from + done) >> PAGE_SHIFT);
				unsigned int within = offset_in_page(from + done);
				unsigned int step = min(part - done, (unsigned int)PAGE_SIZE - within);

				memcpy_from_page(to + done, page, within, step);
				done += step;
			}
		}
		to += part;
		length -= part;
		at = 0;
	}
}

struct headers {
	/* Bytes of Ethernet, IPv4 and TCP; 0: something else. */
	unsigned int length;
	/* The end of the packet as IPv4 counts it. */
	unsigned int end;
	__be32 source, destination;
	__be16 source_port, destination_port;
};

static struct headers parse(const struct sk_buff *skb)
{
	struct headers headers = {};
	const struct ethhdr *ethernet = (const struct ethhdr *)skb->data;
	const struct iphdr *ip = (const struct iphdr *)(ethernet + 1);
	const struct tcphdr *tcp;
	unsigned int head = skb_headlen(skb), ip_length;

	if (head < ETH_HLEN + sizeof(*ip) || ethernet->h_proto != htons(ETH_P_IP) || ip->version != 4)
		return headers;
	ip_length = ip->ihl * 4;
	if (ip_length < sizeof(*ip) || ip->protocol != IPPROTO_TCP || ip_is_fragment(ip) || head < ETH_HLEN + ip_length + sizeof(*tcp))
		return headers;
	tcp = (const struct tcphdr *)((const u8 *)ip + ip_length);
	if (tcp->doff * 4 < sizeof(*tcp) || head < ETH_HLEN + ip_length + tcp->doff * 4)
		return headers;
	headers.length = ETH_HLEN + ip_length + tcp->doff * 4;
	headers.end = skb_is_gso(skb) ? skb->len : min(skb->len, ETH_HLEN + (unsigned int)ntohs(ip->tot_len));
	if (headers.end < headers.length)
		return (struct headers){};
	headers.source = ip->saddr;
	headers.destination = ip->daddr;
	headers.source_port = tcp->source;
	headers.destination_port = tcp->dest;
	return headers;
}

/* Sums a packet that the stack has sent with its checksum complete, as a NIC does: something between may have damaged it. */
static bool checksum_good(struct nic *sender, const struct sk_buff *skb, const struct headers *headers)
{
	const struct iphdr *ip = (const struct iphdr *)(skb->data + ETH_HLEN);
	unsigned int from = ETH_HLEN + ip->ihl * 4, at = from, part;
	__wsum sum = 0;
	u8 bytes[256];

	if (ip_fast_csum(ip, ip->ihl))
		return false;
	while (at < headers->end) {
		part = min_t(unsigned int, headers->end - at, sizeof(bytes));
		read_packet(sender, skb, at, bytes, part);
		sum = csum_block_add(sum, csum_partial(bytes, part, 0), at - from);
		at += part;
	}
	return csum_tcpudp_magic(ip->saddr, ip->daddr, headers->end - from, IPPROTO_TCP, sum) == 0;
}

/* Receiving. */

static bool deliver(struct nic *nic, struct queue *queue, struct sk_buff *sent)
{
	struct nic *sender = nic->peer;
	struct headers headers = parse(sent);
	struct page_pool *pool = queue->memory.pool;
	bool device = page_pool_is_unreadable(pool), partial = sent->ip_summed == CHECKSUM_PARTIAL, good;
	unsigned int length = headers.length ? headers.end : sent->len, linear, payload, at, part, number, every;
	struct sk_buff *skb;

	payload = headers.length ? length - headers.length : 0;
	good = partial || (headers.length && checksum_good(sender, sent, &headers));
	if (headers.length && !good)
		atomic64_inc(&nic->counters[BAD_CHECKSUM]);
	/* A packet whose checksum is wrong is not split: the CPU is to see it. */
	if (headers.length && nic->split && payload >= nic->threshold && good) {
		linear = headers.length;
		number = payload ? atomic_inc_return(&nic->packets) : 0;
		every = READ_ONCE(drop_every);
		if (payload && every && number % every == 0) {
			atomic64_inc(&nic->counters[LOST]);
			return true;
		}
		every = READ_ONCE(unsplit_every);
		if (payload && every && number % every == 0) {
			linear += min3(payload, READ_ONCE(unsplit_bytes), 1000U);
			atomic64_inc(&nic->counters[UNSPLIT]);
		}
	} else {
		/* Only memory of the host can take what is not split. */
		linear = device ? length : min_t(unsigned int, length, COPIED_HEAD);
	}
	skb = napi_alloc_skb(&queue->napi, linear);
	if (!skb)
		goto starved;
	read_packet(sender, sent, 0, skb_put(skb, linear), linear);
	skb_mark_for_recycle(skb);
	for (at = linear; at < length; at += part) {
		netmem_ref netmem = page_pool_alloc_netmems(pool, GFP_ATOMIC | __GFP_NOWARN);

		if (!netmem || skb_shinfo(skb)->nr_frags == MAX_SKB_FRAGS) {
			if (netmem)
				page_pool_put_full_netmem(pool, netmem, false);
			kfree_skb(skb);
			goto starved;
		}
		part = min(length - at, fragment);
		every = READ_ONCE(unwritten_every);
		if (!device || !every || atomic_inc_return(&nic->fragments) % every)
			read_packet(sender, sent, at, at_dma_address(nic, page_pool_get_dma_addr_netmem(netmem)) + offset, part);
		page_pool_dma_sync_netmem_for_cpu(pool, netmem, offset, part);
		skb_add_rx_frag_netmem(skb, skb_shinfo(skb)->nr_frags, netmem, offset, part, PAGE_SIZE);
		if (device)
			atomic64_add(part, &queue->counters[2]);
	}
	if (skb_is_gso(sent) && payload > skb_shinfo(sent)->gso_size) {
		skb_shinfo(skb)->gso_size = skb_shinfo(sent)->gso_size;
		skb_shinfo(skb)->gso_segs = DIV_ROUND_UP(payload, skb_shinfo(sent)->gso_size);
		skb_shinfo(skb)->gso_type = skb_shinfo(sent)->gso_type & (SKB_GSO_TCPV4 | SKB_GSO_TCPV6);
	}
	atomic64_inc(&queue->counters[0]);
	atomic64_add(length, &queue->counters[1]);
	skb->ip_summed = good ? CHECKSUM_UNNECESSARY : CHECKSUM_NONE;
	skb_record_rx_queue(skb, queue - nic->queues);
	skb->protocol = eth_type_trans(skb, nic->dev);
	napi_gro_receive(&queue->napi, skb);
	return true;
starved:
	atomic64_inc(&nic->counters[STARVED]);
	return false;
}

static int poll(struct napi_struct *napi, int budget)
{
	struct queue *queue = container_of(napi, struct queue, napi);
	struct nic *nic = netdev_priv(napi->dev);
	struct sk_buff *sent;
	int done = 0;

	while (done < budget && (sent = skb_dequeue(&queue->arrived))) {
		if (deliver(nic, queue, sent))
			dev_consume_skb_any(sent);
		else
			dev_kfree_skb_any(sent);
		done++;
	}
	if (done < budget && napi_complete_done(napi, done) && !skb_queue_empty(&queue->arrived))
		napi_schedule(napi);
	return done;
}

/* Which queue of the receiver a packet belongs to. */

static bool matches(const struct ethtool_rx_flow_spec *rule, const struct headers *headers)
{
	const struct ethtool_tcpip4_spec *want = &rule->h_u.tcp_ip4_spec, *mask = &rule->m_u.tcp_ip4_spec;

	return !((headers->source ^ want->ip4src) & mask->ip4src) && !((headers->destination ^ want->ip4dst) & mask->ip4dst) &&
	       !((headers->source_port ^ want->psrc) & mask->psrc) && !((headers->destination_port ^ want->pdst) & mask->pdst);
}

static struct queue *choose(struct nic *nic, const struct sk_buff *skb)
{
	struct headers headers = parse(skb);
	u32 hash;
	int i;

	if (!headers.length)
		return &nic->queues[nic->table[0]];
	if (nic->dev->features & NETIF_F_NTUPLE)
		for (i = 0; i < RULES; i++)
			if (READ_ONCE(nic->rule_set[i]) && matches(&nic->rules[i], &headers))
				return &nic->queues[nic->rules[i].ring_cookie];
	hash = jhash_3words((__force u32)headers.source, (__force u32)headers.destination,
			    (__force u32)headers.source_port << 16 | (__force u32)headers.destination_port, 0);
	return &nic->queues[READ_ONCE(nic->table[hash % TABLE])];
}

/* Sending: the packet itself goes into the receiver's queue. */

static netdev_tx_t transmit(struct sk_buff *skb, struct net_device *dev)
{
	struct nic *nic = netdev_priv(dev), *peer = nic->peer;
	struct queue *queue;

	if (!netif_carrier_ok(dev) || !netif_running(peer->dev)) {
		dev_kfree_skb_any(skb);
		return NETDEV_TX_OK;
	}
	queue = choose(peer, skb);
	if (skb_queue_len_lockless(&queue->arrived) >= BACKLOG) {
		atomic64_inc(&peer->counters[OVERRUN]);
		dev_kfree_skb_any(skb);
		return NETDEV_TX_OK;
	}
	atomic64_inc(&nic->sent_packets);
	atomic64_add(skb->len, &nic->sent_bytes);
	skb_tx_timestamp(skb);
	skb_queue_tail(&queue->arrived, skb);
	napi_schedule(&queue->napi);
	return NETDEV_TX_OK;
}

/* Queues. */

static int allocate(struct nic *nic, struct memory *memory, int index)
{
	struct page_pool_params params = {
		.order = 0,
		.pool_size = 256,
		.nid = NUMA_NO_NODE,
		.dev = &nic->parent->dev,
		.dma_dir = DMA_FROM_DEVICE,
		.max_len = PAGE_SIZE,
		.netdev = nic->dev,
		.queue_idx = index,
		.flags = PP_FLAG_DMA_MAP | PP_FLAG_DMA_SYNC_DEV | PP_FLAG_ALLOW_UNREADABLE_NETMEM,
	};

	memory->pool = page_pool_create(&params);
	return PTR_ERR_OR_ZERO(memory->pool);
}

static void start(struct nic *nic, struct memory *memory, int index)
{
	struct queue *queue = &nic->queues[index];

	queue->memory = *memory;
	napi_enable_locked(&queue->napi);
	/* What arrived meanwhile. */
	local_bh_disable();
	napi_schedule(&queue->napi);
	local_bh_enable();
}

static void stop(struct nic *nic, struct memory *memory, int index)
{
	struct queue *queue = &nic->queues[index];

	napi_disable_locked(&queue->napi);
	*memory = queue->memory;
	queue->memory.pool = NULL;
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0)
#define CONFIGURATION struct netdev_queue_config *configuration,
#else
#define CONFIGURATION
#endif

static int queue_allocate(struct net_device *dev, CONFIGURATION void *memory, int index)
{
	return allocate(netdev_priv(dev), memory, index);
}

static void queue_free(struct net_device *dev, void *memory)
{
	page_pool_destroy(((struct memory *)memory)->pool);
}

static int queue_start(struct net_device *dev, CONFIGURATION void *memory, int index)
{
	start(netdev_priv(dev), memory, index);
	return 0;
}

static int queue_stop(struct net_device *dev, void *memory, int index)
{
	stop(netdev_priv(dev), memory, index);
	return 0;
}

static const struct netdev_queue_mgmt_ops queue_operations = {
	.ndo_queue_mem_size = sizeof(struct memory),
	.ndo_queue_mem_alloc = queue_allocate,
	.ndo_queue_mem_free = queue_free,
	.ndo_queue_start = queue_start,
	.ndo_queue_stop = queue_stop,
};

static int open(struct net_device *dev)
{
	struct nic *nic = netdev_priv(dev);
	struct memory memory[QUEUES];
	int i, error;

	for (i = 0; i < QUEUES; i++) {
		error = allocate(nic, &memory[i], i);
		if (error) {
			while (i--)
				page_pool_destroy(memory[i].pool);
			return error;
		}
	}
	for (i = 0; i < QUEUES; i++)
		start(nic, &memory[i], i);
	netif_tx_start_all_queues(dev);
	if (netif_running(nic->peer->dev)) {
		netif_carrier_on(dev);
		netif_carrier_on(nic->peer->dev);
	}
	return 0;
}

static int close(struct net_device *dev)
{
	struct nic *nic = netdev_priv(dev);
	struct memory memory;
	int i;

	netif_carrier_off(dev);
	netif_carrier_off(nic->peer->dev);
	netif_tx_stop_all_queues(dev);
	/* Packets that the peer is handing over. */
	synchronize_net();
	for (i = 0; i < QUEUES; i++) {
		stop(nic, &memory, i);
		skb_queue_purge(&nic->queues[i].arrived);
		page_pool_destroy(memory.pool);
	}
	return 0;
}

static void statistics(struct net_device *dev, struct rtnl_link_stats64 *stats)
{
	struct nic *nic = netdev_priv(dev);
	int i;

	for (i = 0; i < QUEUES; i++) {
		stats->rx_packets += atomic64_read(&nic->queues[i].counters[0]);
		stats->rx_bytes += atomic64_read(&nic->queues[i].counters[1]);
	}
	stats->tx_packets = atomic64_read(&nic->sent_packets);
	stats->tx_bytes = atomic64_read(&nic->sent_bytes);
	stats->rx_dropped = atomic64_read(&nic->counters[STARVED]) + atomic64_read(&nic->counters[OVERRUN]);
}

static const struct net_device_ops operations = {
	.ndo_open = open,
	.ndo_stop = close,
	.ndo_start_xmit = transmit,
	.ndo_get_stats64 = statistics,
	.ndo_set_mac_address = eth_mac_addr,
	.ndo_validate_addr = eth_validate_addr,
};

/* ethtool: rings, channels, table, rules, counters. */

static void get_rings(struct net_device *dev, struct ethtool_ringparam *ring, struct kernel_ethtool_ringparam *more, struct netlink_ext_ack *extack)
{
	struct nic *nic = netdev_priv(dev);

	ring->rx_max_pending = ring->rx_pending = BACKLOG;
	ring->tx_max_pending = ring->tx_pending = BACKLOG;
	more->tcp_data_split = nic->split ? ETHTOOL_TCP_DATA_SPLIT_ENABLED : ETHTOOL_TCP_DATA_SPLIT_DISABLED;
	more->hds_thresh = nic->threshold;
	more->hds_thresh_max = 1024;
}

static int set_rings(struct net_device *dev, struct ethtool_ringparam *ring, struct kernel_ethtool_ringparam *more, struct netlink_ext_ack *extack)
{
	struct nic *nic = netdev_priv(dev);

	nic->split = more->tcp_data_split == ETHTOOL_TCP_DATA_SPLIT_ENABLED;
	nic->threshold = more->hds_thresh;
	return 0;
}

static void get_channels(struct net_device *dev, struct ethtool_channels *channels)
{
	channels->max_combined = channels->combined_count = QUEUES;
}

static u32 table_size(struct net_device *dev)
{
	return TABLE;
}

static int get_table(struct net_device *dev, struct ethtool_rxfh_param *table)
{
	struct nic *nic = netdev_priv(dev);

	table->hfunc = ETH_RSS_HASH_XOR;
	if (table->indir)
		memcpy(table->indir, nic->table, sizeof(nic->table));
	return 0;
}

static int set_table(struct net_device *dev, struct ethtool_rxfh_param *table, struct netlink_ext_ack *extack)
{
	struct nic *nic = netdev_priv(dev);

	if (table->indir)
		memcpy(nic->table, table->indir, sizeof(nic->table));
	return 0;
}

static u32 ring_count(struct net_device *dev)
{
	return QUEUES;
}

static int get_rules(struct net_device *dev, struct ethtool_rxnfc *request, u32 *places)
{
	struct nic *nic = netdev_priv(dev);
	u32 i, found = 0;

	switch (request->cmd) {
	case ETHTOOL_GRXRINGS:
		request->data = QUEUES;
		return 0;
	case ETHTOOL_GRXCLSRLCNT:
		request->rule_cnt = 0;
		for (i = 0; i < RULES; i++)
			request->rule_cnt += nic->rule_set[i];
		request->data = RULES;
		return 0;
	case ETHTOOL_GRXCLSRULE:
		if (request->fs.location >= RULES || !nic->rule_set[request->fs.location])
			return -ENOENT;
		request->fs = nic->rules[request->fs.location];
		return 0;
	case ETHTOOL_GRXCLSRLALL:
		for (i = 0; i < RULES; i++) {
			if (!nic->rule_set[i])
				continue;
			if (found == request->rule_cnt)
				return -EMSGSIZE;
			places[found++] = i;
		}
		request->rule_cnt = found;
		request->data = RULES;
		return 0;
	}
	return -EOPNOTSUPP;
}

static int set_rules(struct net_device *dev, struct ethtool_rxnfc *request)
{
	struct nic *nic = netdev_priv(dev);
	u32 place = request->fs.location;

	if (place >= RULES)
		return -EINVAL;
	switch (request->cmd) {
	case ETHTOOL_SRXCLSRLINS:
		if (request->fs.flow_type != TCP_V4_FLOW || request->fs.ring_cookie >= QUEUES)
			return -EOPNOTSUPP;
		WRITE_ONCE(nic->rule_set[place], false);
		synchronize_net();
		nic->rules[place] = request->fs;
		smp_store_release(&nic->rule_set[place], true);
		return 0;
	case ETHTOOL_SRXCLSRLDEL:
		if (!nic->rule_set[place])
			return -ENOENT;
		WRITE_ONCE(nic->rule_set[place], false);
		return 0;
	}
	return -EOPNOTSUPP;
}

static int count_strings(struct net_device *dev, int set)
{
	return set == ETH_SS_STATS ? COUNTERS + QUEUES * QUEUE_COUNTERS : -EOPNOTSUPP;
}

static void get_names(struct net_device *dev, u32 set, u8 *names)
{
	int i, j;

	if (set != ETH_SS_STATS)
		return;
	for (i = 0; i < COUNTERS; i++)
		ethtool_puts(&names, counter_names[i]);
	for (i = 0; i < QUEUES; i++)
		for (j = 0; j < QUEUE_COUNTERS; j++)
			ethtool_sprintf(&names, "rx%d_%s", i, queue_counter_names[j]);
}

static void get_counters(struct net_device *dev, struct ethtool_stats *stats, u64 *values)
{
	struct nic *nic = netdev_priv(dev);
	int i, j;

	for (i = 0; i < COUNTERS; i++)
		*values++ = atomic64_read(&nic->counters[i]);
	for (i = 0; i < QUEUES; i++)
		for (j = 0; j < QUEUE_COUNTERS; j++)
			*values++ = atomic64_read(&nic->queues[i].counters[j]);
}

static void describe(struct net_device *dev, struct ethtool_drvinfo *info)
{
	strscpy(info->driver, NIC, sizeof(info->driver));
}

static const struct ethtool_ops ethtool_operations = {
	.supported_ring_params = ETHTOOL_RING_USE_TCP_DATA_SPLIT | ETHTOOL_RING_USE_HDS_THRS,
	.get_drvinfo = describe,
	.get_link = ethtool_op_get_link,
	.get_ringparam = get_rings,
	.set_ringparam = set_rings,
	.get_channels = get_channels,
	.get_rxfh_indir_size = table_size,
	.get_rxfh = get_table,
	.set_rxfh = set_table,
	.get_rx_ring_count = ring_count,
	.get_rxnfc = get_rules,
	.set_rxnfc = set_rules,
	.get_sset_count = count_strings,
	.get_strings = get_names,
	.get_ethtool_stats = get_counters,
};

/* The pair. */

static void destroy(struct nic *nic)
{
	struct platform_device *parent;

	if (!nic)
		return;
	parent = nic->parent;
	free_netdev(nic->dev);
	/*
	 * The kernel ends a binding some time after its last user, and asks this device to unmap the dma-buf even if the NIC is gone. So the
	 * structure stays, at the price of its memory.
	 */
	get_device(&parent->dev);
	platform_device_unregister(parent);
}

static struct nic *create(int number)
{
	struct platform_device *parent = platform_device_register_simple(NIC, number, NULL, 0);
	struct net_device *dev;
	struct nic *nic;
	int i;

	if (IS_ERR(parent))
		return NULL;
	dev = alloc_etherdev_mqs(sizeof(struct nic), QUEUES, QUEUES);
	if (!dev || dma_set_mask_and_coherent(&parent->dev, DMA_BIT_MASK(64))) {
		if (dev)
			free_netdev(dev);
		platform_device_unregister(parent);
		return NULL;
	}
	SET_NETDEV_DEV(dev, &parent->dev);
	nic = netdev_priv(dev);
	nic->dev = dev;
	nic->parent = parent;
	nic->threshold = split_threshold;
	for (i = 0; i < TABLE; i++)
		nic->table[i] = ethtool_rxfh_indir_default(i, QUEUES);
	for (i = 0; i < QUEUES; i++) {
		skb_queue_head_init(&nic->queues[i].arrived);
		netif_napi_add(dev, &nic->queues[i].napi, poll);
	}
	snprintf(dev->name, sizeof(dev->name), "vmnic%d", number);
	eth_hw_addr_random(dev);
	dev->netdev_ops = &operations;
	dev->ethtool_ops = &ethtool_operations;
	dev->queue_mgmt_ops = &queue_operations;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 2, 0)
	dev->netmem_tx = NETMEM_TX_DMA;
#else
	dev->netmem_tx = true;
#endif
	dev->cfg->hds_thresh = split_threshold;
	dev->max_mtu = 9000;
	dev->hw_features = NETIF_F_SG | NETIF_F_HW_CSUM | NETIF_F_TSO | NETIF_F_TSO6 | NETIF_F_RXCSUM | NETIF_F_NTUPLE | NETIF_F_HIGHDMA;
	dev->features = dev->hw_features & ~NETIF_F_NTUPLE;
	/* A packet of the sender becomes one of the receiver, in so many fragments. */
	netif_set_tso_max_size(dev, min(FRAGMENTS * fragment, (unsigned int)GSO_LEGACY_MAX_SIZE));
	return nic;
}

static int __init load(void)
{
	int error;

	if (!fragment || fragment + offset > PAGE_SIZE)
		return -EINVAL;
	nics[0] = create(0);
	nics[1] = create(1);
	if (!nics[0] || !nics[1]) {
		error = -ENOMEM;
		goto failed;
	}
	nics[0]->peer = nics[!loop];
	nics[1]->peer = nics[loop];
	netif_carrier_off(nics[0]->dev);
	netif_carrier_off(nics[1]->dev);
	error = register_netdev(nics[0]->dev);
	if (error)
		goto failed;
	error = register_netdev(nics[1]->dev);
	if (!error)
		return 0;
	unregister_netdev(nics[0]->dev);
failed:
	destroy(nics[0]);
	destroy(nics[1]);
	return error;
}

static void __exit unload(void)
{
	unregister_netdev(nics[0]->dev);
	unregister_netdev(nics[1]->dev);
	destroy(nics[0]);
	destroy(nics[1]);
}

module_init(load);
module_exit(unload);
MODULE_DESCRIPTION("A pair of network devices for tests of device memory TCP");
MODULE_AUTHOR("The authors of libuccl_p2p");
MODULE_LICENSE("Dual MIT/GPL");
MODULE_IMPORT_NS("NETDEV_INTERNAL");
