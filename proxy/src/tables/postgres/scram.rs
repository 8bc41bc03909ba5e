//! Shows a password without telling it: SCRAM-SHA-256 (RFC 5802, RFC 7677), as PostgreSQL asks for it. Both sides must know the password,
//! so a server that does not is found out too.

use std::num::NonZeroU32;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom, SystemRandom};
use ring::{digest, hmac, pbkdf2};

use crate::tables::secret::Secret;

/// The name of the mechanism.
pub(super) const NAME: &str = "SCRAM-SHA-256";
/// No channel binding: `n,,` in base64.
const NO_BINDING: &str = "biws";
/// The most rounds that a server may ask for: each connection costs them. PostgreSQL's own number is 4,096.
const ROUNDS_MAX: u32 = 1_000_000;

/// An exchange that the server did not keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ScramError {
    #[error("the server does not keep to SCRAM-SHA-256")]
    Garbled,
    #[error("the server does not know the password itself, so it is another one")]
    Stranger,
}

/// What was said first.
pub(super) struct First {
    nonce: String,
}

/// What was said last, and what the server must answer.
pub(super) struct Last {
    pub(super) message: String,
    proof_of_server: hmac::Tag,
}

impl First {
    pub(super) fn draw() -> Self {
        let mut nonce = [0; 18];
        SystemRandom::new().fill(&mut nonce).expect("the system gives random bytes");
        Self { nonce: STANDARD.encode(nonce) }
    }

    /// PostgreSQL knows the name already.
    fn bare(&self) -> String {
        format!("n=,r={}", self.nonce)
    }

    pub(super) fn message(&self) -> String {
        format!("n,,{}", self.bare())
    }

    /// Answers the server's challenge.
    pub(super) fn answer(&self, password: &Secret, challenge: &str) -> Result<Last, ScramError> {
        let mut parts = challenge.split(',');
        let mut part = |name: &str| parts.next().and_then(|part| part.strip_prefix(name));
        let (nonce, salt, rounds) = (part("r="), part("s="), part("i="));
        let nonce = nonce.filter(|nonce| nonce.starts_with(&self.nonce) && *nonce != self.nonce);
        let salt = salt.and_then(|salt| STANDARD.decode(salt).ok());
        let rounds = rounds.and_then(|rounds| rounds.parse::<NonZeroU32>().ok());
        let rounds = rounds.filter(|rounds| rounds.get() <= ROUNDS_MAX);
        let (Some(nonce), Some(salt), Some(rounds)) = (nonce, salt, rounds) else {
            return Err(ScramError::Garbled);
        };
        let mut salted = [0; digest::SHA256_OUTPUT_LEN];
        let Secret(password) = password;
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, &salt, password.as_bytes(), &mut salted);
        let client = keyed(&salted, b"Client Key");
        let stored = digest::digest(&digest::SHA256, client.as_ref());
        let without_proof = format!("c={NO_BINDING},r={nonce}");
        let all = format!("{},{challenge},{without_proof}", self.bare());
        let signature = keyed(stored.as_ref(), all.as_bytes());
        let proof: Vec<u8> =
            client.as_ref().iter().zip(signature.as_ref()).map(|(a, b)| a ^ b).collect();
        let server = keyed(&salted, b"Server Key");
        Ok(Last {
            message: format!("{without_proof},p={}", STANDARD.encode(proof)),
            proof_of_server: keyed(server.as_ref(), all.as_bytes()),
        })
    }
}

impl Last {
    /// Believes the server, or not.
    pub(super) fn check(&self, answer: &str) -> Result<(), ScramError> {
        let shown = answer.strip_prefix("v=").and_then(|shown| STANDARD.decode(shown).ok());
        match shown {
            None => Err(ScramError::Garbled),
            Some(shown) if shown == self.proof_of_server.as_ref() => Ok(()),
            Some(_) => Err(ScramError::Stranger),
        }
    }
}

fn keyed(key: &[u8], text: &[u8]) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The exchange of RFC 7677, 3, but for the name, which is not sent to PostgreSQL.
    #[test]
    fn a_password_is_shown_as_the_standard_has_it() {
        let first = First { nonce: "rOprNGfwEbeRWgbNEkqO".to_owned() };
        let password = Secret("pencil".to_owned());
        let challenge = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                         s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let last = first.answer(&password, challenge).unwrap();
        assert!(
            last.message
                .starts_with("c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=")
        );
        let right = format!("v={}", STANDARD.encode(last.proof_of_server.as_ref()));
        assert_eq!(last.check(&right), Ok(()));
        let other = first.answer(&Secret("pen".to_owned()), challenge).unwrap();
        assert_eq!(other.check(&right), Err(ScramError::Stranger));
        assert_eq!(last.check("e=other-error"), Err(ScramError::Garbled));
        for bad in [
            "",
            "r=rOprNGfwEbeRWgbNEkqO,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
            "r=another,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
            "r=rOprNGfwEbeRWgbNEkqOx,s=?,i=4096",
            "r=rOprNGfwEbeRWgbNEkqOx,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=0",
            "r=rOprNGfwEbeRWgbNEkqOx,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4000000000",
        ] {
            assert_eq!(first.answer(&password, bad).err(), Some(ScramError::Garbled), "{bad}");
        }
    }
}
