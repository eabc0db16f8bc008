//! [`ToAddresses`], one address or several, and the [`Rotation`] in which they are tried.

use std::{
    fmt,
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fastrand::Rng;

/// Time limit of a connection to one of several addresses. It is short, since another one may respond.
pub(super) const LIMIT_OF_ONE: Duration = Duration::from_secs(3);

/// The same in all lists of this process, so that two processes begin with different servers, and all connections of
/// one with the same.
static SEED: LazyLock<u64> = LazyLock::new(|| fastrand::u64(..));

/// One address of a server, or several of a cluster.
///
/// It is a string, or an array, slice or vector of strings. A string may contain several addresses, separated by commas,
/// if each has its scheme: `amqp://a:5672,amqp://b:5672`.
///
/// Several are tried in an order that is drawn once for the process, so that the workers of a fleet spread over the
/// servers. A name with several records in DNS is one address; each of its records is tried.
///
/// It is not meant to be implemented.
pub trait ToAddresses: sealed::Sealed {
    /// Returns the addresses one by one.
    #[doc(hidden)]
    fn to_addresses(&self) -> Vec<String>;
}

mod sealed {
    pub trait Sealed {}
}

impl sealed::Sealed for str {}
impl sealed::Sealed for String {}
impl<A> sealed::Sealed for [A] {}
impl<A, const N: usize> sealed::Sealed for [A; N] {}
impl<A> sealed::Sealed for Vec<A> {}
impl<A: ?Sized> sealed::Sealed for &A {}

impl ToAddresses for str {
    fn to_addresses(&self) -> Vec<String> {
        split(self)
    }
}

impl ToAddresses for String {
    fn to_addresses(&self) -> Vec<String> {
        split(self)
    }
}

impl<A: AsRef<str>> ToAddresses for [A] {
    fn to_addresses(&self) -> Vec<String> {
        self.iter().flat_map(|one| split(one.as_ref())).collect()
    }
}

impl<A: AsRef<str>, const N: usize> ToAddresses for [A; N] {
    fn to_addresses(&self) -> Vec<String> {
        self.as_slice().to_addresses()
    }
}

impl<A: AsRef<str>> ToAddresses for Vec<A> {
    fn to_addresses(&self) -> Vec<String> {
        self.as_slice().to_addresses()
    }
}

impl<A: ToAddresses + ?Sized> ToAddresses for &A {
    fn to_addresses(&self) -> Vec<String> {
        (**self).to_addresses()
    }
}

/// Splits a list at its commas.
///
/// A password may contain a comma, but no `/`. So a comma ends an address if a scheme follows.
fn split(list: &str) -> Vec<String> {
    let mut addresses: Vec<String> = Vec::new();
    for part in list.split(',') {
        match addresses.last_mut() {
            Some(last) if !has_scheme(part.trim_start()) => {
                last.push(',');
                last.push_str(part);
            }
            _ => addresses.push(part.to_owned()),
        }
    }
    let trimmed = addresses.iter().map(|address| address.trim().to_owned());
    trimmed.collect()
}

fn has_scheme(address: &str) -> bool {
    let scheme = address.split_once("://").map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// Addresses in the order of their tries. It begins each round after the address that was tried last.
pub(super) struct Rotation<A> {
    addresses: Vec<A>,
    next: AtomicUsize,
}

impl<A> Rotation<A> {
    pub(super) fn new(mut addresses: Vec<A>) -> Self {
        Rng::with_seed(*SEED).shuffle(&mut addresses);
        Self {
            addresses,
            next: AtomicUsize::new(0),
        }
    }

    /// Returns each address once. One that is not taken from it is the first of the next round.
    pub(super) fn round(&self) -> impl Iterator<Item = &A> {
        let first = self.next.load(Ordering::Relaxed);
        let rotated = self.addresses.iter().enumerate().cycle().skip(first);
        rotated.take(self.addresses.len()).map(|(index, address)| {
            let next = (index + 1) % self.addresses.len();
            self.next.store(next, Ordering::Relaxed);
            address
        })
    }
}

/// Returns the error of a round: that of the only address, or one of `all`.
pub(super) fn round_error<E>(mut errors: Vec<E>, all: impl FnOnce(Vec<E>) -> E) -> E {
    match errors.len() {
        1 => errors.remove(0),
        _ => all(errors),
    }
}

/// Prints the errors of a round in one line, each with its causes.
pub(super) fn write_errors(
    f: &mut fmt::Formatter<'_>,
    broker: &str,
    errors: &[impl fmt::Display],
) -> fmt::Result {
    write!(f, "none of {} addresses of {broker} works", errors.len())?;
    for (index, error) in errors.iter().enumerate() {
        let sign = if index == 0 { ':' } else { ';' };
        write!(f, "{sign} {error:#}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Rotation, ToAddresses};

    #[test]
    fn one_string_may_hold_several_addresses() {
        let both = ["amqp://a:1/%2f", "amqps://u:p,w@b"].map(String::from);
        assert_eq!("amqp://a:1/%2f,amqps://u:p,w@b".to_addresses(), both);
        assert_eq!(" amqp://a:1/%2f , amqps://u:p,w@b ".to_addresses(), both);
        assert_eq!(both.to_addresses(), both);
        assert_eq!(both.to_vec().to_addresses(), both);
        assert_eq!(both[..].to_addresses(), both);
        // None of these is a list.
        for one in ["", "host:4222", "host:4222,other", "amqp://u:a,b@host"] {
            assert_eq!(one.to_addresses(), [one]);
        }
    }

    #[test]
    fn a_round_has_each_address_and_begins_after_the_last_one() {
        let rotation = Rotation::new(Vec::from_iter(0..4));
        let order: Vec<_> = rotation.round().copied().collect();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2, 3]);
        assert_eq!(rotation.round().next(), Some(&order[0]));
        let next: Vec<_> = rotation.round().take(2).copied().collect();
        assert_eq!(next, [order[1], order[2]]);
        assert_eq!(rotation.round().next(), Some(&order[3]));
    }

    #[test]
    fn all_lists_of_a_process_have_the_same_order() {
        let orders = [(); 8].map(|()| {
            let rotation = Rotation::new(Vec::from_iter(0..50));
            Vec::from_iter(rotation.round().copied())
        });
        assert!(orders.iter().all(|order| *order == orders[0]));
    }
}
