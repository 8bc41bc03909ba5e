//! What a task of an exclusive job holds, slice by slice, as one view shows it to every request.

use std::collections::BTreeSet;
use std::sync::Arc;

use mandoline_core::assignment::Assignment;
use mandoline_core::generation::Generation;
use mandoline_core::lease::Held;
use mandoline_core::slice::Slice;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::transit::HandOffId;

use crate::gate::{Gate, Gates};
use crate::term::Term;

/// One slice that the task holds.
#[derive(Debug)]
pub(crate) struct Tenure {
    /// Since when without a break.
    pub(crate) since: Generation,
    /// Its fencing token.
    pub(crate) token: Generation,
    pub(crate) gates: Gates,
    /// Whether it is being released, and when the right to it ends whatever is under way: nanoseconds of the boot clock.
    pub(crate) release: Option<(HandOffId, u64)>,
}

impl Tenure {
    /// The end of the right to this slice, if it is before the session's.
    pub(crate) fn limit(&self) -> u64 {
        self.release.map_or(u64::MAX, |(_, limit)| limit)
    }
}

/// All that the task holds: a place for each slice of the assignment.
#[derive(Debug)]
pub(crate) struct Tenures {
    pub(crate) term: Arc<Term>,
    of: Box<[Option<Tenure>]>,
}

impl Tenures {
    /// Nothing is held.
    pub(crate) fn none(term: Arc<Term>, slices: usize) -> Self {
        Self { term, of: (0..slices).map(|_| None).collect() }
    }

    /// Takes over what an older view held, guards included, as far as it is still held without a break and `ready` for it.
    pub(crate) fn after(
        term: &Arc<Term>,
        old: Option<(&Self, &Assignment)>,
        assignment: &Assignment,
        held: &[Held],
        ready: &SliceMap<Option<Generation>>,
    ) -> Self {
        let mut tenures = Self::none(Arc::clone(term), assignment.slices.count());
        let old = old.filter(|(old, _)| Arc::ptr_eq(&old.term, term));
        for Held { slice, since, token, release } in held {
            if !ready.touching(*slice).all(|(_, known)| known == &Some(*since)) {
                continue;
            }
            let gates = old.map_or_else(Gates::open, |(old, before)| {
                let kept = before.slices.touching(*slice).map(|(part, _)| part);
                old.gates_of(*slice, *since, before, &kept.collect::<Vec<_>>())
            });
            let release = release.map(|(id, until)| (id, until.as_nanos()));
            let index = assignment.slices.index_of(slice.first());
            tenures.of[index] = Some(Tenure { since: *since, token: *token, gates, release });
        }
        tenures
    }

    /// The gates of a slice whose keys lay in these slices before.
    fn gates_of(
        &self,
        slice: Slice,
        since: Generation,
        before: &Assignment,
        parts: &[Slice],
    ) -> Gates {
        let tenure = |part: &Slice| {
            let tenure = self.at(before.slices.index_of(part.first()))?;
            (tenure.since == since).then_some(tenure)
        };
        let known: Vec<&Tenure> = parts.iter().filter_map(tenure).collect();
        match known.as_slice() {
            [same] if parts == [slice] => same.gates.kept(),
            [] => Gates::open(),
            _ => Gates::after(known.iter().map(|tenure| &tenure.gates)),
        }
    }

    /// Gives what is held at a place.
    pub(crate) fn at(&self, index: usize) -> Option<&Tenure> {
        self.of[index].as_ref()
    }

    /// Says whether new work may be taken at a place right now.
    pub(crate) fn accepts(&self, index: usize) -> bool {
        self.at(index).is_some_and(|tenure| tenure.release.is_none()) && self.term.holds(u64::MAX)
    }

    /// Closes the gates of what is being released, and sends those who would enter gates that were replaced on to the new ones.
    /// To be called once the view that shows this is published.
    pub(crate) fn take_over(&self, old: Option<&Self>) {
        let kept: BTreeSet<*const Gate> =
            self.iter().map(|tenure| Arc::as_ptr(tenure.gates.own())).collect();
        let replaced = old.into_iter().flat_map(Self::iter);
        for tenure in replaced.filter(|old| !kept.contains(&Arc::as_ptr(old.gates.own()))) {
            tenure.gates.supersede();
        }
        for tenure in self.iter() {
            match tenure.release {
                // Whoever waits for it asks whether it is drained.
                Some(_) => drop(tenure.gates.close()),
                None => tenure.gates.reopen(),
            }
        }
    }

    /// Ends every guard for good.
    pub(crate) fn revoke(&self) {
        self.iter().for_each(|tenure| tenure.gates.revoke());
    }

    /// Says whether no guard is left of a slice that is being released.
    pub(crate) fn is_drained(&self, id: HandOffId) -> bool {
        let released = |tenure: &&Tenure| tenure.release.is_some_and(|(own, _)| own == id);
        // What is not shown yet is still being taken into use, and cannot be passed on before it is.
        self.iter().find(released).is_some_and(|tenure| tenure.gates.is_drained())
    }

    fn iter(&self) -> impl Iterator<Item = &Tenure> {
        self.of.iter().flatten()
    }
}
