//! The sample service: an in-memory cache of values by key, sharded by Mandoline. A task serves the keys that it owns.
//!
//! `task` puts it together with a slicelet, as any service would: bind, start a slicelet, ask it about each request, drop
//! what left, and drain before the end.

pub(crate) mod store;
pub(crate) mod server;
pub(crate) mod moving;

#[cfg(test)]
pub(crate) mod testing {
    //! A shard that an assignment never changes.

    use std::sync::Mutex;

    use mandoline::Utilisation;
    use mandoline::slicelet::{Claim, CostError, NotOwner, Owner};
    use mandoline_core::generation::Generation;
    use mandoline_core::key::SliceKey;
    use mandoline_core::slice::Slice;

    use crate::demo::server::Shard;

    pub(crate) struct Part {
        slice: Slice,
        counted: Mutex<f64>,
        stay: Mutex<Stay>,
    }

    /// Whether the slice goes while a request is under way.
    struct Stay {
        entries_left: usize,
        comes_back: bool,
    }

    impl Part {
        pub(crate) fn new(slice: Slice) -> Self {
            let stay = Mutex::new(Stay { entries_left: usize::MAX, comes_back: false });
            Self { slice, counted: Mutex::default(), stay }
        }

        /// The slice goes once so many more requests have been taken in, the last of them under way.
        pub(crate) fn goes_after(&self, entries: usize) {
            self.stay.lock().unwrap().entries_left = entries;
        }

        /// When it goes, it is back at once.
        pub(crate) fn comes_back(&self) {
            self.stay.lock().unwrap().comes_back = true;
        }

        pub(crate) fn counted(&self) -> f64 {
            *self.counted.lock().unwrap()
        }
    }

    impl Shard for Part {
        /// Whether the slice stays.
        type Guard = bool;

        fn acquire(&self, key: &[u8], cost: f64) -> Result<bool, NotOwner> {
            if !(0.0..=1e6).contains(&cost) {
                return Err(CostError(cost).into());
            }
            *self.counted.lock().unwrap() += cost;
            let mut stay = self.stay.lock().unwrap();
            let is_here = stay.entries_left > 0 || stay.comes_back;
            if is_here && self.slice.contains(SliceKey::of(key)) {
                stay.entries_left = stay.entries_left.saturating_sub(1);
                return Ok(stay.entries_left > 0);
            }
            let owner = Some("10.0.0.7:9000".parse().unwrap());
            let generation = Generation { incarnation: 1, number: 42 };
            Err(NotOwner::Elsewhere { owner, generation })
        }

        fn still_owned(stays: &bool) -> bool {
            *stays
        }

        fn claim_spilled(&self, key: &[u8], cost: f64) -> Result<Claim, CostError> {
            match self.acquire(key, cost) {
                Ok(_) => Ok(Claim::Mine),
                Err(NotOwner::Elsewhere { owner: address, generation }) => {
                    Ok(Claim::Elsewhere(Owner { address, generation }))
                }
                Err(other) => panic!("{other}"),
            }
        }

        fn utilisation(&self) -> Utilisation {
            Utilisation { requests: 1, thousandths: (self.counted() * 1_000.0) as u64 }
        }
    }
}
