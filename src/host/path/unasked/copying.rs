//! How a path starts and ends what goes under grants: reads and orders of this side, orders of the peer, and the pulls of all of them.
//! Knows nothing of frames.

use super::super::{host, memory, pulls, LocalPath, Note};
use super::*;

impl LocalPath {
    /// The peer has shown the token of a region, for memory of it at `there`.
    pub(in super::super) fn grant(&mut self, region: &RegionUse, there: Place) {
        let unasked = &mut self.unasked;
        let pulled = pulls(&self.pairs, &self.pushed, (region.place, there));
        if unasked.off || unasked.grants.has(region.span.id, there) || !pulled {
            return;
        }
        let exports = match (region.place.is_device(), &mut self.device) {
            (true, Some(device)) => {
                self.shares.share(region, there, &mut **device);
                self.shares.exports(region.span.id, there).filter(|ids| ids.len() <= MAX_EXPORTS)
            }
            (true, None) => None,
            (false, _) => region.is_readable(host::is_readable).then(Vec::new),
        };
        // Its end is to be told.
        region.to_share();
        unasked.grants.give(region.region(), there, exports);
        self.news.store(true, Ordering::Release);
    }

    /// Starts a transfer for which nobody has to be asked, if all of it is granted. Nothing has begun after `false`.
    pub(in super::super) fn start_direct(&mut self, transfer: &mut Direct<'_>) -> Result<bool> {
        let known = |p: &Pairing| pulls(&self.pairs, &self.pushed, (p.here, p.there));
        if self.unasked.off || !transfer.pairings.iter().all(known) {
            return Ok(false);
        }
        match transfer.way {
            Way::In => self.start_read(transfer),
            Way::Out => self.start_order(transfer),
        }
    }

    // ---- reads of this side ----

    /// What a pairing's blocks are pulled from, where it is granted and reached.
    fn source(&self, pairing: &Pairing) -> Option<Source> {
        let granted = self.unasked.leases.find(pairing.region, pairing.there, pairing.here)?;
        let inside = pairing.far.0 >= granted.addr && pairing.far.1 <= granted.addr + granted.len;
        if granted.token != pairing.token || !granted.access.read || !inside {
            return None;
        }
        let stretches = self.imports.range(&granted.exports, pairing.here, pairing.far)?;
        if pairing.here.is_device() && !cover(&stretches, pairing.far) {
            return None;
        }
        Some(Source { slot: granted.slot, generation: granted.generation, stretches })
    }

    fn start_read(&mut self, transfer: &mut Direct<'_>) -> Result<bool> {
        let Some(sources) = transfer.pairings.iter().map(|p| self.source(p)).collect::<Option<Vec<Source>>>() else {
            return Ok(false);
        };
        let place = transfer.pairings.first().map_or(Place::HOST, |p| p.here);
        // Mixed destinations are rare enough for the control connection.
        if transfer.pairings.iter().any(|p| p.here != place) || memory(&mut self.host, &mut self.device, place).is_none() {
            return Ok(false);
        }
        let mut slots: Vec<u32> = Vec::new();
        for Source { slot, generation, .. } in &sources {
            if !self.unasked.leases.enter(*slot, *generation) {
                slots.iter().for_each(|&slot| self.unasked.leases.leave(slot));
                return Ok(false);
            }
            slots.push(*slot);
        }
        let reading = Reading { key: transfer.key, slots, pulls: 0, all: false, _hold: transfer.hold.clone() };
        self.unasked.reads.push(reading);
        let mut stride = Stride::first(transfer.total);
        while let Some((exports, bytes)) = self.gather(transfer, &sources, stride)? {
            self.pull_pieces(place, exports, bytes, Whose::Read(transfer.key))?;
            if let Some(read) = self.unasked.reads.last_mut() {
                read.pulls += 1;
            }
            stride = stride.next();
        }
        if let Some(read) = self.unasked.reads.last_mut() {
            read.all = true;
        }
        Ok(true)
    }

    /// The pieces of a read's next pull: the exports that they lie in, and their bytes; `None` at the end.
    fn gather(&mut self, transfer: &mut Direct<'_>, sources: &[Source], stride: Stride) -> Result<Option<(Vec<u32>, u64)>> {
        let Unasked { pieces, .. } = &mut self.unasked;
        let (mut exports, mut bytes): (Vec<u32>, u64) = (Vec::new(), 0);
        pieces.clear();
        while pieces.len() < stride.blocks && bytes < stride.bytes {
            let begin = pieces.len();
            let most = (stride.blocks - begin).min(AT_ONCE);
            let Some(pairing) = transfer.blocks.fill(most, stride.bytes - bytes, pieces) else { break };
            bytes += pieces[begin..].iter().map(|p| p.len).sum::<u64>();
            let Some(Source { stretches, .. }) = sources.get(pairing) else { bail!(Internal, "blocks of no pairing") };
            if !stretches.is_empty() {
                locate(pieces, begin, stretches, |id| {
                    if !exports.contains(&id) {
                        exports.push(id);
                    }
                })?;
            }
        }
        Ok((!pieces.is_empty()).then_some((exports, bytes)))
    }

    /// Starts a pull of the pieces at hand, which have so many bytes.
    fn pull_pieces(&mut self, place: Place, exports: Vec<u32>, bytes: u64, whose: Whose) -> Result<()> {
        for &id in &exports {
            self.imports.enter(id, place)?;
        }
        let Some(memory) = memory(&mut self.host, &mut self.device, place) else {
            bail!(Internal, "a pull into memory of nobody")
        };
        memory.belongs_to(match &whose {
            Whose::Read(key) => key.id << 1,
            Whose::Orders(parts) => parts.first().map_or(0, |order| order << 1 | 1),
        });
        let pieces = &self.unasked.pieces;
        // SAFETY: sources lie in the peer's process or in open mappings, which `exports` keeps; destinations are held by the read or by
        // the order, which stay until the pull has ended, or for ever where it does not end.
        let pull = unsafe { memory.pull(place, pieces) }?;
        let (pieces, begun) = (pieces.len(), Instant::now());
        self.unasked.batches.push(Batch { pull, place, exports, pieces, bytes, moved: 0, begun, whose });
        Ok(())
    }

    // ---- orders of this side ----

    /// Where the peer finds a pairing's blocks, where it has granted their destination.
    fn target(&mut self, pairing: &Pairing, hold: &Hold) -> Option<Source> {
        let granted = self.unasked.leases.find(pairing.region, pairing.there, pairing.here)?;
        let inside = pairing.far.0 >= granted.addr && pairing.far.1 <= granted.addr + granted.len;
        if granted.token != pairing.token || !granted.access.write || !inside {
            return None;
        }
        let (slot, generation) = (granted.slot, granted.generation);
        let mut stretches = Vec::new();
        if !pairing.here.is_device() && !hold.region(pairing.local)?.is_readable(host::is_readable) {
            return None;
        }
        if pairing.here.is_device() {
            let region = hold.region_to_share(pairing.local)?;
            let device = self.device.as_mut()?;
            if !self.shares.share(region, pairing.there, &mut **device) {
                return None;
            }
            stretches = self.shares.stretches(region.span.id, pairing.there, pairing.near).to_vec();
            if !cover(&stretches, pairing.near) {
                return None;
            }
        }
        Some(Source { slot, generation, stretches })
    }

    fn start_order(&mut self, transfer: &mut Direct<'_>) -> Result<bool> {
        if self.unasked.told.len() + 1 >= WINDOW {
            return Ok(false);
        }
        let mut targets = Vec::with_capacity(transfer.pairings.len());
        for pairing in transfer.pairings {
            match self.target(pairing, transfer.hold) {
                Some(target) => targets.push(target),
                None => {
                    // Something may have been told for the first time.
                    self.news.store(true, Ordering::Release);
                    return Ok(false);
                }
            }
        }
        let unasked = &mut self.unasked;
        let order = unasked.out.begin();
        let (key, len) = (transfer.key, transfer.total);
        unasked.told.push_back(Told {
            order,
            key,
            len,
            begun: Instant::now(),
            over: false,
            moved: 0,
            _hold: transfer.hold.clone(),
        });
        unasked.ordered_bytes += len;
        let mut stride = Stride::first(transfer.total);
        loop {
            let Unasked { pieces, .. } = &mut self.unasked;
            pieces.clear();
            let Some(pairing) = transfer.blocks.fill(stride.blocks.min(MAX_BLOCKS), stride.bytes, pieces) else { break };
            let Some(Source { slot, generation, stretches }) = targets.get(pairing) else {
                bail!(Internal, "blocks of no pairing")
            };
            let head = Head { order, slot: *slot, generation: *generation, export: 0, last: transfer.blocks.is_done() };
            self.unasked.tell(head, stretches)?;
            self.wake();
            stride = stride.next();
        }
        Ok(true)
    }

    /// Wakes the peer if it sleeps.
    pub(in super::super) fn wake(&mut self) {
        if self.inbox.wakes() {
            self.notes.push_back(Note::Ring);
            // What the socket does not take waits for the next round.
            let _ = self.answer();
        }
    }

    // ---- orders of the peer ----

    /// Starts pulls for what the peer orders.
    pub(super) fn take_orders(&mut self) -> Result<bool> {
        let (mut any, mut records) = (false, 0);
        // As for reads: what waits is not all prepared before the first of it is copied.
        let mut stride = if self.unasked.order_pulls == 0 { FIRST } else { MOST };
        while self.unasked.pieces_under_way < UNDER_WAY && self.unasked.order_pulls < PULLS && records < RECORDS {
            let mut pull = Gathered::default();
            let mut read = false;
            self.unasked.pieces.clear();
            while self.unasked.pieces.len() < stride.blocks.min(MAX_BLOCKS) && pull.bytes < stride.bytes && records < RECORDS {
                let unasked = &mut self.unasked;
                let Some((head, count)) = unasked.inn.next()? else { break };
                if !unasked.add((head, count), &mut self.imports, &mut pull)? {
                    break;
                }
                read = true;
                records += 1;
                // One that was refused and has nothing under way has ended.
                if pull.parts.last() != Some(&head.order) && unasked.settle(head.order) {
                    self.ring_later();
                }
            }
            let Gathered { place, exports, parts, bytes } = pull;
            if let Some(place) = place {
                for &number in &parts {
                    if let Some(order) = self.unasked.order(number) {
                        order.pulls += 1;
                    }
                }
                self.unasked.pieces_under_way += self.unasked.pieces.len();
                self.unasked.order_pulls += 1;
                self.pull_pieces(place, exports, bytes, Whose::Orders(parts))?;
            }
            if !read {
                break;
            }
            any = true;
            stride = stride.next();
        }
        // The rest of an order that did not fit comes once there is room, and whoever tells it may sleep.
        if any && self.unasked.wants_more() {
            self.ring_later();
        }
        Ok(any)
    }

    fn ring_later(&mut self) {
        if self.inbox.wakes() {
            self.notes.push_back(Note::Ring);
        }
    }

    /// Reports pulls that have ended, in any order.
    fn end_pulls(&mut self, events: &mut Vec<Event>) -> Result<bool> {
        let (mut any, mut i) = (false, 0);
        while let Some(batch) = self.unasked.batches.get(i) {
            let Some(memory) = memory(&mut self.host, &mut self.device, batch.place) else { bail!(Internal, "a pull of nobody") };
            let (pull, bytes) = (batch.pull, batch.bytes);
            if !memory.poll(pull)? {
                // Large ones end together, since all have their turns: what each has shows that they go on.
                let copied = memory.copied(pull, bytes);
                self.moved(i, copied.min(bytes), events);
                i += 1;
                continue;
            }
            // What was copied counts only if its owner left it alone until here.
            if self.inbox.closed() {
                bail!(RemoteDisconnect, "the peer's process has closed the connection");
            }
            any = true;
            self.moved(i, bytes, events);
            let Batch { exports, pieces, whose, .. } = self.unasked.batches.remove(i);
            if let Some(device) = &mut self.device {
                exports.into_iter().for_each(|id| self.imports.release(id, &mut **device));
            }
            match whose {
                Whose::Read(key) => self.unasked.end_read(key, events),
                Whose::Orders(parts) => {
                    self.unasked.pieces_under_way -= pieces;
                    self.unasked.order_pulls -= 1;
                    for number in parts {
                        if let Some(order) = self.unasked.order(number) {
                            order.pulls -= 1;
                        }
                        if self.unasked.settle(number) {
                            self.ring_later();
                        }
                    }
                }
            }
        }
        Ok(any)
    }

    /// So many bytes of a batch are in place.
    fn moved(&mut self, at: usize, bytes: u64, events: &mut Vec<Event>) {
        let Some(batch) = self.unasked.batches.get_mut(at) else { return };
        let more = bytes.saturating_sub(batch.moved);
        if more == 0 {
            return;
        }
        batch.moved += more;
        let read = match batch.whose {
            Whose::Read(key) => Some(key),
            Whose::Orders(_) => None,
        };
        self.count_received(more);
        match read {
            Some(key) => {
                self.unasked.inn.read(more);
                events.push(Event::Moved(key, more));
            }
            None => self.unasked.inn.moved(more),
        }
    }

    /// Advances all of it.
    pub(in super::super) fn advance_direct(&mut self, events: &mut Vec<Event>) -> Result<bool> {
        let mut any = false;
        if !self.unasked.unsent.is_empty() && self.unasked.tell_more()? {
            self.wake();
            any = true;
        }
        any |= self.unasked.report(events)?;
        if self.unasked.inn.waiting() {
            any |= self.take_orders()?;
        }
        if !self.unasked.batches.is_empty() {
            any |= self.end_pulls(events)?;
        }
        Ok(any)
    }
}
