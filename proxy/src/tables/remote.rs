//! How a table behind connections is asked: a few questions at a time, each on a connection of its own that is kept for the next, so that
//! one that hangs keeps no other waiting.

use std::cell::RefCell;
use std::future::{Future, pending};
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::lookup::desk::{Desk, Teller};
use crate::lookup::{Fault, Found, Told};

/// A table behind connections.
pub(super) trait Remote: 'static {
    /// Asks one question at a time.
    type Connection: 'static;

    /// Gets through to the table.
    fn connect(&self) -> impl Future<Output = Result<Self::Connection, Fault>>;

    /// Asks for a key.
    fn ask(&self, connection: &mut Self::Connection, key: &[u8]) -> impl Future<Output = Found>;

    /// Says whether another question can be asked there.
    fn is_usable(connection: &Self::Connection) -> bool;

    /// Hears of changes, for as long as it is let.
    fn watch(&self, _teller: &Teller) -> impl Future<Output = ()> {
        pending()
    }
}

/// Answers what is asked until nobody is left who could ask, over at most so many connections at a time.
pub(super) async fn serve<R: Remote>(remote: R, most: usize, mut desk: Desk) {
    let (teller, within) = (desk.teller(), desk.within());
    let remote = Rc::new(remote);
    let kept: Rc<RefCell<Vec<R::Connection>>> = Rc::default();
    let places = Arc::new(Semaphore::new(most));
    // All end with this set, and so with whoever would be told.
    let mut tasks = JoinSet::new();
    let (watching, told) = (Rc::clone(&remote), teller.clone());
    tasks.spawn_local(async move { watching.watch(&told).await });
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("it is never closed");
        let Some(key) = desk.next().await else { return };
        while tasks.try_join_next().is_some() {}
        let (remote, kept, teller) = (Rc::clone(&remote), Rc::clone(&kept), teller.clone());
        tasks.spawn_local(async move {
            teller.asks(&key);
            loop {
                let asking = timeout(within, ask(&*remote, &kept, &key));
                let found = asking.await.unwrap_or(Err(Fault::Late));
                if teller.answer(&key, found) == Told::Enough {
                    break;
                }
            }
            drop(place);
        });
    }
}

/// Asks once; and again on a new connection where one that was kept turns out to be of no use.
async fn ask<R: Remote>(remote: &R, kept: &RefCell<Vec<R::Connection>>, key: &[u8]) -> Found {
    let known = kept.borrow_mut().pop();
    if let Some(mut connection) = known {
        let found = remote.ask(&mut connection, key).await;
        if R::is_usable(&connection) {
            kept.borrow_mut().push(connection);
            return found;
        }
        if found.is_ok() {
            return found;
        }
        // Those beside it are as old.
        kept.borrow_mut().clear();
    }
    let mut connection = remote.connect().await?;
    let found = remote.ask(&mut connection, key).await;
    if R::is_usable(&connection) {
        kept.borrow_mut().push(connection);
    }
    found
}

/// Says why the table cannot be asked, with all that lies behind it.
pub(super) fn down(error: &dyn std::error::Error) -> Fault {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    Fault::Down(text)
}
