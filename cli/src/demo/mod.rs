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
    }

    impl Part {
        pub(crate) fn new(slice: Slice) -> Self {
            Self { slice, counted: Mutex::default() }
        }

        pub(crate) fn counted(&self) -> f64 {
            *self.counted.lock().unwrap()
        }
    }

    impl Shard for Part {
        type Guard = ();

        fn acquire(&self, key: &[u8], cost: f64) -> Result<(), NotOwner> {
            if !(0.0..=1e6).contains(&cost) {
                return Err(CostError(cost).into());
            }
            *self.counted.lock().unwrap() += cost;
            if self.slice.contains(SliceKey::of(key)) {
                return Ok(());
            }
            let owner = Some("10.0.0.7:9000".parse().unwrap());
            let generation = Generation { incarnation: 1, number: 42 };
            Err(NotOwner::Elsewhere { owner, generation })
        }

        fn claim_spilled(&self, key: &[u8], cost: f64) -> Result<Claim, CostError> {
            match self.acquire(key, cost) {
                Ok(()) => Ok(Claim::Mine),
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
